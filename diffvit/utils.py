"""The Hugging Face account: credentials from the environment or from a .env file."""

from __future__ import annotations

import os

from diffvit.errors import UserError


def check_upload() -> None:
    """Finds out before a training starts whether its result could be sent.

    Raises:
        UserError: HF_TOKEN or HF_REPOSITORY is missing; or both are there, for this version does not send yet.
    """
    from dotenv import dotenv_values

    known = {**dotenv_values(".env"), **os.environ}
    missing = [name for name in ("HF_TOKEN", "HF_REPOSITORY") if not known.get(name)]
    if missing:
        raise UserError(
            f"--upload true needs {' and '.join(missing)}, and neither the environment nor .env has it.",
            "write them into .env (see .env.example), or leave out --upload.",
        )
    raise UserError("this version cannot upload yet.", "leave out --upload; the files stay in the checkpoints folder.")
