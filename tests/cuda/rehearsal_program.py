"""What a rehearsal counts and what it refuses, number by number; prints a JSON object, an entry for each function."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist

from mrlhf.parallel.offload import Parking
from mrlhf.parallel.rehearsal import Rehearsal, Report, unpaired

MIB = 1 << 20


def raised(call: Callable[[], Any]) -> str:
    try:
        call()
    except Exception as error:  # any kind: its name is the result
        return type(error).__name__
    return ""


@contextmanager
def one_rank(**options: Any) -> Iterator[Rehearsal]:
    with Rehearsal(**options) as rehearsal, rehearsal.tracing("it"):
        yield rehearsal


def refused() -> dict[str, str]:
    with one_rank():
        cuda, host = torch.ones(2, 2, device="cuda"), torch.ones(2, 2)
        half, layer = torch.ones(2, 2, device="cuda", dtype=torch.bfloat16), torch.nn.Linear(2, 2)
        return {
            "devices": raised(lambda: cuda + host),
            "dtypes": raised(lambda: cuda @ half),
            "module left on the host": raised(lambda: layer(cuda)),
            "module moved": raised(lambda: layer.to("cuda")(cuda).sum().backward()),
            "norm of two dtypes": raised(lambda: torch.nn.functional.rms_norm(half, (2,), cuda[0])),
            "shapes": raised(lambda: cuda + torch.ones(3, device="cuda")),
        }


def waits() -> dict[str, int]:
    counted = {}

    def count(name: str, call: Callable[[], Any]) -> None:
        with one_rank() as rehearsal:
            x = torch.randn(4, device="cuda")
            mask = torch.tensor([True, False, True, True], device="cuda")
            before = sum(rehearsal.report().host_waits.values())
            call(x, mask)
            [*places] = rehearsal.report().host_waits
            assert all(place.endswith("rehearsal_program.py:<lambda>") for _, place in places), places
            counted[name] = sum(rehearsal.report().host_waits.values()) - before

    count("item", lambda x, mask: x[0].item())
    count("float", lambda x, mask: float(x.sum()))
    count("bool", lambda x, mask: bool(x.isnan().any()))
    count("tolist", lambda x, mask: x.tolist())
    count("cpu", lambda x, mask: x.cpu())
    count("to", lambda x, mask: x.to("cpu"))
    count("copy_", lambda x, mask: torch.empty(4).copy_(x))
    count("to, not blocking", lambda x, mask: x.to("cpu", non_blocking=True))
    count("nonzero", lambda x, mask: mask.nonzero())
    count("masked_select", lambda x, mask: x.masked_select(mask))
    count("index by a mask", lambda x, mask: x[mask])
    count("index by numbers", lambda x, mask: x[torch.tensor([0, 1], device="cuda")])
    count("write by a mask", lambda x, mask: x.masked_fill_(mask, 0))
    count("unique", lambda x, mask: mask.long().unique())
    count("equal", lambda x, mask: torch.equal(x, x))
    count("tensor of two numbers", lambda x, mask: torch.tensor([x[0], x[1]]))
    count("synchronize", lambda x, mask: torch.cuda.synchronize())
    count("stream", lambda x, mask: torch.cuda.current_stream().synchronize())
    count("event", lambda x, mask: torch.cuda.Event().record().synchronize())
    count("to the device", lambda x, mask: torch.ones(4).to("cuda"))
    return counted


def values() -> dict[str, Any]:
    """Of small tensors made from host data, through the device and back."""
    batch = torch.tensor([[5, 6, 0, 0], [7, 8, 9, 0]])  # made outside, as a loader does
    with one_rank(world=4):
        tokens = batch.to("cuda")
        mask = (tokens > 0).float()
        lengths = mask.sum(1).long()
        view, loss = lengths[1:], torch.randn((), device="cuda")
        view += 10
        parts = torch.stack([loss, mask.sum()])
        total, most = mask.sum(), mask.sum()
        dist.all_reduce(total)
        dist.all_reduce(most, op=dist.ReduceOp.MAX)
        gathered = torch.empty(8, dtype=torch.long, device="cuda")
        dist.all_gather_into_tensor(gathered, lengths)
        experts = torch.randn(6, 4, device="cuda").topk(2).indices
        dist.all_reduce(parts)
        unknown = lengths.clone()
        unknown.copy_(torch.randint(5, (2,), device="cuda"))
        return {
            "lengths": lengths.tolist(),
            "cumulated": lengths.cumsum(0).tolist(),
            "kept": mask.bool().nonzero().shape[0],
            "selected": tokens.masked_select(tokens > 6).shape[0],
            "indexed": tokens[tokens > 6].shape[0],
            "beside a loss": parts.tolist(),
            "summed": total.item(),
            "largest": most.item(),
            "gathered": gathered.tolist(),
            "chosen equally often": experts.flatten().bincount().tolist(),
            "unknown": unknown.tolist(),
            "of a copy": lengths.cpu().numpy().tolist(),
        }


def memory() -> dict[str, Any]:
    with Rehearsal() as rehearsal:
        with rehearsal.tracing("a"):
            weights = torch.empty(MIB, device="cuda")
            rehearsal.meter.name_part("weights", [weights])
            weights + 1
        with rehearsal.tracing("b"):
            views = weights[:10].view(2, 5)
            some = [torch.empty(100, dtype=torch.uint8, device="cuda") for _ in range(3)]
            del some[0]
        with rehearsal.tracing("c"):
            parking = Parking()
            freed = parking.park([weights])
            away = torch.cuda.memory_allocated()
            parking.fetch()
            back = torch.cuda.memory_allocated()
        report = rehearsal.report()
        return {
            "a": [report.peaks["a"].nbytes, dict(report.peaks["a"].parts)],
            "b": report.peaks["b"].nbytes,
            "parked": [freed, away, back],
            "free": torch.cuda.mem_get_info()[1] - torch.cuda.mem_get_info()[0],
            "views": views.numel(),
            "copies": [[list(key), n] for key, n in report.copies.items()],
        }


def flops() -> dict[str, int]:
    from torch.nn.attention.varlen import varlen_attn

    with Rehearsal() as rehearsal:
        with rehearsal.tracing("product"):
            a, b = (torch.ones(n, m, device="cuda", requires_grad=True) for n, m in ((3, 5), (5, 7)))
            (a @ b).sum().backward()
        with rehearsal.tracing("attention"):
            x = torch.ones(6, 2, 8, device="cuda", dtype=torch.bfloat16)
            cu = torch.tensor([0, 2, 6], dtype=torch.int32).to("cuda")
            varlen_attn(x, x, x, cu, cu, 4, 4, window_size=(-1, 0))
        return dict(rehearsal.report().flops)


def squares() -> list[str]:
    with one_rank(square=50) as rehearsal:
        row = torch.ones(2, 60, 8, device="cuda")
        row @ row.transpose(1, 2)
        torch.ones(60, 49, device="cuda")
        return [what for _, what in rehearsal.report().squares]


def fused_kernels() -> dict[str, int]:
    """Bytes that attention and norms keep for backward."""
    kept = {}
    with one_rank() as rehearsal:
        q, k = (torch.ones(1, n, 64, 16, device="cuda", dtype=torch.bfloat16, requires_grad=True) for n in (4, 2))
        before = rehearsal.meter.live
        out = torch.nn.functional.scaled_dot_product_attention(q, k, k, is_causal=True, enable_gqa=True)
        kept["attention"] = rehearsal.meter.live - before
        before = rehearsal.meter.live
        normed = torch.nn.functional.rms_norm(q, (16,), torch.ones(16, device="cuda", dtype=torch.bfloat16))
        kept["norm"] = rehearsal.meter.live - before
        (out.sum() + normed.sum()).backward()
    return kept


def paired() -> dict[str, list[str]]:
    """Programs of two ranks; what the report says of them."""

    def same(rank: int) -> None:
        dist.all_reduce(torch.ones(4, device="cuda"))
        dist.send(torch.ones(4, device="cuda"), 1) if rank == 0 else dist.recv(torch.ones(4, device="cuda"), 0)

    def order(rank: int) -> None:
        calls = [lambda: dist.all_reduce(torch.ones(4, device="cuda")), lambda: dist.barrier()]
        for call in calls if rank else reversed(calls):
            call()

    def sizes(rank: int) -> None:
        dist.all_reduce(torch.ones(4 + rank, device="cuda"))

    def missing(rank: int) -> None:
        if rank:
            dist.all_reduce(torch.ones(4, device="cuda"))

    def lonely_send(rank: int) -> None:
        if rank == 0:
            dist.send(torch.ones(4, device="cuda"), 1)

    def short_receive(rank: int) -> None:
        dist.send(torch.ones(4, device="cuda"), 1) if rank == 0 else dist.recv(torch.ones(2, device="cuda"), 0)

    def splits(rank: int) -> None:
        sizes = [3, 1] if rank == 0 else [1, 3]  # to each rank; what comes should be 3 + 1 and 1 + 3
        dist.all_to_all_single(torch.ones(4, device="cuda"), torch.ones(4, device="cuda"), sizes, sizes)

    def wrong_splits(rank: int) -> None:
        dist.all_to_all_single(torch.ones(4, device="cuda"), torch.ones(4, device="cuda"), [3, 1], [3, 1])

    problems = {}
    for program in (same, order, sizes, missing, lonely_send, short_receive, splits, wrong_splits):
        reports: list[Report] = []
        for rank in (0, 1):
            with one_rank(rank=rank, world=2) as rehearsal:
                program(rank)
            reports.append(rehearsal.report())
        problems[program.__name__] = unpaired(reports)
    return problems


if __name__ == "__main__":
    functions = (refused, waits, values, memory, flops, squares, fused_kernels, paired)
    print("RESULT " + json.dumps({f.__name__: f() for f in functions}))
