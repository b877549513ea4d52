"""Which Ray cluster, whether it answers, and the token that it wants.

The only file that uses Ray's private modules. Ray alone tries a refused token for 20 s and then says only that it cannot connect
(2.58 and 2.60), so the cluster's head is asked first.
"""

from __future__ import annotations

import os
import secrets
import socket
from pathlib import Path
from typing import Any

from diffvit.errors import UserError


def find_address(address: str | None = None) -> str:
    """host:port of the cluster to use, or "local" for one of our own.

    The given address comes first, then $RAY_ADDRESS, then a cluster that `ray start` or `ray up` left on this host.
    """
    return given_address(address) or _cluster_on_this_host() or "local"


def given_address(address: str | None) -> str | None:
    """The address from the argument or $RAY_ADDRESS; None where Ray would search for a cluster."""
    given = address or os.environ.get("RAY_ADDRESS")
    return given if given and given != "auto" else None


def _cluster_on_this_host() -> str | None:
    """The address that the last `ray start` on this host wrote down, if that cluster still answers.

    A Ray that another program started for itself is not written there, and is not ours to join: it ends with that program.
    """
    try:
        address = (ray_folder() / "ray_current_cluster").read_text().strip()
    except (OSError, ValueError):
        return None
    return address if address and gcs_answers(address) else None


def ray_folder() -> Path:
    """The folder in which Ray keeps its sessions and the address of this host's cluster."""
    return Path(os.environ.get("RAY_TMPDIR") or os.environ.get("TMPDIR") or "/tmp") / "ray"


def _channel(address: str) -> Any:
    """A gRPC channel to a cluster's head with the options of Ray's own channels: it bypasses proxies."""
    import grpc
    from ray._private.ray_constants import GLOBAL_GRPC_OPTIONS

    return grpc.insecure_channel(address, options=GLOBAL_GRPC_OPTIONS)


def gcs_answers(address: str) -> bool:
    """Whether a gRPC server, which a cluster's head is, and not just any program answers at host:port."""
    import grpc

    with _channel(address) as channel:
        try:
            grpc.channel_ready_future(channel).result(timeout=3)
        except grpc.FutureTimeoutError:
            return False
    return True


def ensure_token() -> None:
    """Create the token of a Ray of our own where Ray would, by default from 2.59. Without a home folder, keep it in the environment.

    Raises:
        UserError: the environment names a token that is not there.
    """
    from ray._private.authentication import authentication_token_setup as setup
    from ray.exceptions import AuthenticationError

    default = "token" if hasattr(setup, "enable_token_auth_by_default") else "disabled"
    if os.environ.get("RAY_AUTH_MODE", default).lower() != "token":
        return
    loader = setup.AuthenticationTokenLoader.instance()
    try:
        if not loader.has_token(ignore_auth_mode=True):
            setup.generate_and_save_token()
    except AuthenticationError as error:
        raise _no_token(error) from error
    except (OSError, RuntimeError):
        os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
    loader.reset_cache()


def check_token(address: str, found: bool) -> None:
    """Ask the cluster's head whether it takes the token that Ray will send.

    Args:
        found: no address was given, and the cluster is this host's. As Ray does then, try the user's token even without RAY_AUTH_MODE.

    Raises:
        UserError: the cluster wants a token and there is none, or wants another one.
    """
    from ray._private.authentication import authentication_token_setup as setup
    from ray.exceptions import AuthenticationError

    try:
        setup.ensure_token_if_auth_enabled(create_token_if_missing=False)
        if _is_taken(address):
            return
        if found and hasattr(setup, "maybe_enable_token_auth_if_token_available"):  # from Ray 2.59
            setup.maybe_enable_token_auth_if_token_available(warn_if_disabled=False)
            if _is_taken(address):
                return
    except AuthenticationError as error:
        raise _no_token(error) from error
    has_one = os.environ.get("RAY_AUTH_MODE", "").lower() == "token"
    wanted = "another token than this one" if has_one else "a token, and none was given"
    raise UserError(f"the Ray cluster at {address} wants {wanted}.", _TOKEN_HINT)


_TOKEN_HINT = "set RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN_PATH to the file that has the cluster's token."


def _no_token(error: Exception) -> UserError:
    return UserError(f"RAY_AUTH_MODE is token, and there is none: {getattr(error, 'message', error)}.", _TOKEN_HINT)


def _is_taken(address: str) -> bool:
    """Whether the cluster's head accepts the token that Ray sends now. Ray itself reports other faults."""
    import grpc
    from ray._private.authentication.authentication_token_setup import AuthenticationTokenLoader

    token = tuple(AuthenticationTokenLoader.instance().get_token_for_http_header().items())
    with _channel(address) as channel:
        try:
            channel.unary_unary("/ray.rpc.NodeInfoGcsService/GetClusterId")(b"", timeout=10, metadata=token)
        except grpc.RpcError as error:
            return error.code() is not grpc.StatusCode.UNAUTHENTICATED
    return True


def listens(place: tuple[str, int]) -> bool:
    """Whether something takes connections at (host, port)."""
    try:
        with socket.create_connection(place, timeout=5):
            return True
    except OSError:
        return False
