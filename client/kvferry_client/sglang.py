"""SGLang's transfer backend: ``--disaggregation-transfer-backend kvferry``.

SGLang finds ``register`` through the entry-point group ``sglang.srt.plugins`` in each of its
processes, and its hooks make the backend known; nothing of SGLang is edited. See docs/engines.md.
"""

import os
from enum import Enum
from typing import Any

from kvferry_client.sglang_versions import ALLOW, check_version

BACKEND = "kvferry"
UTILS = "sglang.srt.disaggregation.utils"
PREFILL = "sglang.srt.disaggregation.prefill.PrefillBootstrapQueue"
DECODE = "sglang.srt.disaggregation.decode.DecodePreallocQueue"


def register() -> None:
    """Make the backend known to this process of SGLang."""
    from sglang.srt.arg_groups.choices import add_disagg_transfer_backend_choices
    from sglang.srt.disaggregation.utils import TransferBackend
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    add_disagg_transfer_backend_choices([BACKEND])
    members = [(one.name, one.value) for one in TransferBackend]
    backends = Enum("TransferBackend", [*members, (BACKEND.upper(), BACKEND)], module=UTILS)  # type: ignore[misc]
    HookRegistry.register(f"{UTILS}.TransferBackend", backends, HookType.REPLACE)
    HookRegistry.register(f"{UTILS}.get_kv_class", _kv_class, HookType.AROUND)
    for queue in (PREFILL, DECODE):
        HookRegistry.register(f"{queue}._init_kv_manager", _attach, HookType.AFTER)
    HookRegistry.register(f"{PREFILL}.create_sender", _sends, HookType.AFTER)
    HookRegistry.register(f"{DECODE}._create_receiver_and_enqueue", _receives, HookType.AFTER)


def _kv_class(of_sglang: Any, transfer_backend: Any, class_type: Any) -> Any:
    """Our classes for our backend. Here an SGLang that nobody tried is refused: at its start."""
    if transfer_backend.value != BACKEND or class_type.value == "kvargs":
        return of_sglang(transfer_backend, class_type)
    import sglang

    check_version(sglang.__version__, is_allowed=os.environ.get(ALLOW) == "1")
    from kvferry_client.sglang_manager import KvferryBootstrapServer, KvferryManager
    from kvferry_client.sglang_sides import KvferryReceiver, KvferrySender

    return {
        "manager": KvferryManager,
        "sender": KvferrySender,
        "receiver": KvferryReceiver,
        "bootstrap_server": KvferryBootstrapServer,
    }[class_type.value]


def _attach(manager: Any, queue: Any) -> None:
    """Give a manager of ours what its queue knows of the pools."""
    if _is_ours(manager):
        manager.attach(queue)


def _sends(is_created: Any, queue: Any, req: Any, *_args: Any, **_options: Any) -> None:
    """Tell a sender of ours which request it is for."""
    if is_created:
        _tell(req.disagg_kv_sender, req)


def _receives(request: Any, queue: Any, req: Any, *_args: Any, **_options: Any) -> None:
    """Tell a receiver of ours which request it is for."""
    _tell(request.kv_receiver, req)


def _tell(side: Any, req: Any) -> None:
    if _is_ours(side):
        side.is_of(req)


def _is_ours(one: Any) -> bool:
    """And not of another backend, or of SGLang's own for warm-ups."""
    return type(one).__module__.startswith("kvferry_client.")
