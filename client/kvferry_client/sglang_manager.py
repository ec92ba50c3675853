"""The manager of SGLang's backend: one scheduler's cache, its ferry, and who is asked for rooms."""

import asyncio
import logging
import os
import secrets
import time
from pathlib import Path
from typing import Any

import torch.distributed
from aiohttp import web
from sglang.srt.disaggregation.base.conn import KVArgs
from sglang.srt.disaggregation.common.conn import (
    CommonKVBootstrapServer,
    CommonKVManager,
    PrefillServerInfo,
)
from sglang.srt.disaggregation.utils import DisaggregationMode
from sglang.srt.environ import envs
from sglang.srt.runtime_context import get_disagg, get_parallel

from kvferry_client.engine import Ferry, Incoming, Tables
from kvferry_client.sglang_asking import Rooms, Ticket
from kvferry_client.sglang_aux import aux_of
from kvferry_client.sglang_cache import Cache, cache_of
from kvferry_client.sglang_identity import model_identity
from kvferry_client.sglang_rooms import STALL_S, RoomBook
from kvferry_client.sglang_supported import ALLOW, check_arguments, check_parallelism, check_state
from kvferry_proto.runtime_dir import default_runtime_dir

logger = logging.getLogger("sglang.kvferry")
CONNECT_S = 30.0  # how long an engine's start waits for its daemon
SAY_AGAIN_S = 5.0
POOL_BLOCK_TOKENS = 128


def runtime_dir() -> Path:
    """Where the daemon is: what the environment says, or the daemon's default."""
    told = os.environ.get("KVFERRY_RUNTIME_DIR")
    return Path(told) if told else default_runtime_dir()


class KvferryManager(CommonKVManager):  # type: ignore[misc]
    """One scheduler's. ``attach`` gives it the pools, which SGLang's arguments do not name."""

    ferry: Ferry
    cache: Cache

    def __init__(
        self,
        args: KVArgs,
        disaggregation_mode: DisaggregationMode,
        server_args: Any,
        is_mla_backend: bool | None = False,
    ) -> None:
        super().__init__(args, disaggregation_mode, server_args, is_mla_backend)
        self._check_supported(args, server_args)
        is_prefill = disaggregation_mode == DisaggregationMode.PREFILL
        wait_s = envs.SGLANG_DISAGGREGATION_BOOTSTRAP_TIMEOUT.get()
        self.rooms = Rooms("open" if is_prefill else "take", wait_s, self.decline)

    def attach(self, queue: Any) -> None:
        """Look at the pools, begin to join the daemon, and wait a while for it.

        ``queue``: SGLang's, which made this manager. ValueError names what cannot be carried.
        """
        scheduler = queue.scheduler
        if queue.draft_token_to_kv_pool is not None:
            raise ValueError("kvferry does not carry the cache of a draft model")
        total = scheduler.model_config.get_total_num_kv_heads()
        pool = queue.token_to_kv_pool
        if not self.is_mla_backend:
            pool_heads = getattr(pool, "full_kv_pool", pool).head_num
            heads = (
                min(self.attn_tp_size, total) if pool_heads == 1 else pool_heads * self.attn_tp_size
            )
        else:
            heads = 1
        self.aux = aux_of(queue.metadata_buffers)
        block_tokens = int(os.environ.get("KVFERRY_BLOCK_SIZE_TOKENS", POOL_BLOCK_TOKENS))
        self.cache = cache_of(pool, self.aux, heads, block_tokens)
        self.window_tokens = scheduler.sliding_window_size or 0
        self.identity = model_identity(scheduler.server_args, scheduler.model_config, pool)
        self.rooms.engine = _agreed(get_parallel().attn_tp_group.cpu_group)
        self._send_nothing_early(is_overlapping=scheduler.enable_overlap)
        self.ferry = Ferry(
            runtime_dir(),
            self.cache.layout,
            self.cache.groups,
            name=f"sglang {self.disaggregation_mode.value} rank {self.attn_tp_rank}",
            rank=self.attn_tp_rank,
            world_size=self.attn_tp_size,
        )
        self._wait_for_daemon(float(os.environ.get("KVFERRY_CONNECT_S", CONNECT_S)))

    def try_ensure_parallel_info(self, bootstrap_addr: str) -> bool:
        """Nothing has to be known of prefill beforehand: its daemon knows how its pages lie.

        Where the layouts differ, the request fails with the field that does, and not the engine.
        """
        self.prefill_info_table[bootstrap_addr] = PrefillServerInfo(
            attn_tp_size=self.attn_tp_size,
            attn_cp_size=1,
            dp_size=1,
            pp_size=1,
            page_size=None,
            kv_cache_dtype=None,
            follow_bootstrap_room=True,
        )
        return True

    def decline(self, ticket: Ticket) -> None:
        """Tell a daemon that nobody will fetch what it holds, or will send what decode may wait for."""
        if self.disaggregation_mode == DisaggregationMode.DECODE:
            self.receive(ticket, [[] for _ in self.cache.groups], 0, 0)
        elif ticket.transfer_id is not None:
            self.ferry.withdraw(ticket.transfer_id, ticket.reason or "given up by its engine")

    def receive(self, ticket: Ticket, tables: Tables, first_token: int, end_token: int) -> Incoming:
        """Fetch what a room means; ``end_token``: of the last page."""
        assert ticket.transfer_id is not None
        return self.ferry.receive(
            ticket.transfer_id,
            source=None if ticket.source == self.ferry.peer_address else ticket.source,
            tables=tables,
            first_token=first_token,
            end_token=end_token,
            least_tokens=max(0, end_token - self.cache.page_tokens + 1),
        )

    def teardown(self) -> None:
        """Leave the daemon; no page is touched any more."""
        self.ferry.close()

    def _send_nothing_early(self, *, is_overlapping: bool) -> None:
        """Cached prefixes go with what is computed behind them: nobody saw them go before.

        And without CUDA SGLang would end at the first one: it makes events of CUDA's for them.
        """
        early = envs.SGLANG_DISAGG_PREFILL_EARLY_SEND_CACHED_PREFIX
        if self.disaggregation_mode != DisaggregationMode.PREFILL or not early.get():
            return
        is_possible = torch.cuda.is_available() or not is_overlapping
        if not is_possible or os.environ.get(ALLOW) != "1":
            early.set(False)
            words = "cached prefixes are sent with what is computed behind them"
            logger.warning("%s is off: %s; see %s", early.name, words, ALLOW)

    def _wait_for_daemon(self, wait_s: float) -> None:
        until_s = time.monotonic() + wait_s
        while (left_s := until_s - time.monotonic()) > 0:
            if self.ferry.wait_until_joined(min(SAY_AGAIN_S, left_s)):
                return
            why = self.ferry.refusal or "it has not answered yet"
            logger.warning("waiting for kvferry's daemon in %s: %s", runtime_dir(), why)
        logger.error("no daemon: transfers fail until there is one in %s", runtime_dir())

    def _check_supported(self, args: KVArgs, server_args: Any) -> None:
        """ValueError names the first thing that is asked for and cannot be done."""
        sizes = {
            "pipeline": self.pp_size,
            "attention context": self.attn_cp_size,
            "decode context": self.dcp_size,
            "attention data": self.attn_dp_size,
            "data": self.system_dp_size,
        }
        check_parallelism(sizes)
        check_state(one.value for one in args.state_types)
        check_arguments(server_args)
        if get_disagg().disaggregation_enable_kv_checksum:
            raise ValueError(
                "kvferry checks bytes itself: drop --disaggregation-enable-kv-checksum"
            )


def _agreed(group: Any) -> str:
    """A name of this engine, the same for all of its ranks."""
    name = [secrets.token_hex(8)]
    first = torch.distributed.get_global_rank(group, 0)
    torch.distributed.broadcast_object_list(name, src=first, group=group)
    return name[0]


class KvferryBootstrapServer(CommonKVBootstrapServer):  # type: ignore[misc]
    """SGLang's, which routers and engines know, with a book of rooms beside it."""

    def __init__(self, host: str, port: int) -> None:
        self._book = RoomBook(float(os.environ.get("KVFERRY_STALL_S") or STALL_S))
        super().__init__(host, port)

    def _setup_routes(self) -> None:
        super()._setup_routes()
        self.app.router.add_post("/kvferry/rooms", self._handle_rooms)

    async def _handle_rooms(self, request: web.Request) -> web.Response:
        try:
            known = self._book.answer(await request.json(), asyncio.get_running_loop().time())
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            return web.Response(text=f"not a question for rooms: {error!r}", status=400)
        return web.json_response(known)
