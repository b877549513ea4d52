"""Which Ray cluster, whether it answers, and the token that it wants."""

from __future__ import annotations

import os
import secrets
import socket
from pathlib import Path
from typing import Any

from diffvit.errors import UserError


def find_address(address: str | None = None) -> str:
    """host:port of the cluster to use, or "local" for one of our own.

    What is given comes first, then $RAY_ADDRESS, then a cluster that `ray start` or `ray up` left on this host.
    """
    return given_address(address) or _cluster_on_this_host() or "local"


def given_address(address: str | None) -> str | None:
    """The address that the user names; None: one is to be found."""
    given = address or os.environ.get("RAY_ADDRESS")
    return given if given and given != "auto" else None


def _cluster_on_this_host() -> str | None:
    """The address that the last `ray start` on this host wrote down, if that cluster still answers.

    A Ray that another program started for itself is not written there, and is not ours to join: it ends with that program.
    """
    folder = os.environ.get("RAY_TMPDIR") or os.environ.get("TMPDIR") or "/tmp"  # where Ray keeps its sessions
    try:
        address = (Path(folder) / "ray" / "ray_current_cluster").read_text().strip()
    except (OSError, ValueError):
        return None
    return address if address and gcs_answers(address) else None


def _channel(address: str) -> Any:
    """A gRPC channel to a cluster's head that goes the way of Ray's own: past proxies."""
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
    """Makes the token of a Ray of our own where Ray would, by default from 2.59; without a home folder it is kept in the environment.

    Raises:
        UserError: there is no token where the user says that there is one.
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
    """Asks the cluster's head with the token that Ray will send. Ray by itself tries for 20 s, and then says that it cannot connect.

    Args:
        found: the cluster is this host's, and nobody named it. As Ray does then, the user's token is tried even without RAY_AUTH_MODE.

    Raises:
        UserError: there is no token where one is wanted, or it is not the cluster's.
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
    """Whether the cluster's head does not refuse the token that Ray sends now. What else is wrong, Ray will say."""
    import grpc
    from ray._private.authentication.grpc_authentication_client_interceptor import SyncAuthenticationMetadataClientInterceptor

    with _channel(address) as channel:
        asking = grpc.intercept_channel(channel, SyncAuthenticationMetadataClientInterceptor())
        try:
            asking.unary_unary("/ray.rpc.NodeInfoGcsService/GetClusterId")(b"", timeout=10)
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
