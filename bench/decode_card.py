"""Answering on a card at MiniCPM-2B's shape with random weights: tokens a second and the time to the first token.

    python bench/decode_card.py [--parts check,prefill,bf16,int4,transformers] [--tune bf16,int4] [--profile]

check: scores of the captured steps beside the plain layers'. bf16, int4: whole answers through the engine to 1, 4, 16
and 64 questions at once (mean context 192 at most), the first token of a 512-token prompt, seconds until all graphs
are recorded. prefill: prompts by hand beside the plain layers, and where the time to a first token goes.
transformers: `generate` with its dynamic cache, the same shape and lengths. --profile: each kernel's time in a
step and its bandwidth. --tune: other tiles than `decode.TILES`, the best named. A part that fails does not end the
others.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import time
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch

from minitune.infer.engine import Engine, answer_all
from minitune.infer.request import Handle, Request
from minitune.infer.sampling import Sampling
from minitune.model import decode, kernels
from minitune.model.cache import PAGE, DecodeLayout, PagedCache, Part, PrefillLayout
from minitune.model.decode import Columns, DecodeStep, Split, Tile
from minitune.model.decoder import Decoder, DecoderConfig
from minitune.model.prefill import Piece, Prefill
from minitune.model.quantized import Int4Linear, quantize_linears

SHAPE = DecoderConfig(
    vocab_size=122753, hidden_size=2304, intermediate_size=5760, num_hidden_layers=40, num_attention_heads=36,
    num_key_value_heads=36, head_dim=64, embedding_multiplier=12.0, residual_multiplier=1.4 / 40**0.5,
    logits_scaling=9.0,
)  # fmt: skip
ROWS = [Tile(r, w) for r, w in ((2, 4), (4, 4), (8, 4), (4, 2), (2, 8), (4, 8), (1, 4))]
ROWS4 = [Tile(r, w) for r, w in ((1, 2), (2, 2), (4, 2), (2, 1), (4, 1), (2, 4), (4, 4))]
CANDIDATES: dict[str, list[Tile]] = {name: ROWS4 if "4 bits" in name else ROWS for name in decode.TILES}
CANDIDATES["head"] = [Tile(r, w) for r, w in ((4, 4), (8, 4), (8, 8), (16, 4), (4, 8))]
SPLITS = [Split(*s) for s in ((64, 1, 4), (128, 1, 8), (128, 1, 4), (64, 2, 4), (64, 4, 4), (64, 1, 4, 3), (32, 4, 2))]


def decoder_of(four_bits: bool) -> Decoder:
    with torch.device("meta"):
        decoder = Decoder(SHAPE)
    decoder.allocate(torch.device("cuda"), torch.bfloat16)
    for parameter in decoder.parameters():
        parameter.data.fill_(1.0) if parameter.ndim == 1 else parameter.data.normal_(std=0.02)
    if four_bits:
        quantize_linears(decoder, 128)
        for linear in decoder.linears():
            assert isinstance(linear, Int4Linear)
            linear.weight_packed.random_()
            linear.weight_scale.fill_(0.004)
    return decoder.eval()


def tokenizer() -> Any:
    """A word a token, through the same library as a real one."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(WordLevel({f"w{i}": i for i in range(SHAPE.vocab_size)}, unk_token="w0"))
    return PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w0")


def requests(count: int, length: int, tokens: int, first: int = 0, **sampling: Any) -> list[Request]:
    """Prompts of which no two begin alike."""
    settings = Sampling(**{"temperature": 0, "max_new_tokens": tokens, **sampling})
    starts = [1000 + 977 * (first + row) for row in range(count)]
    return [Request(tuple((s + 13 * at) % SHAPE.vocab_size for at in range(length)), settings) for s in starts]


def rate(engine: Engine, asked: list[Request]) -> float:
    """Tokens a second from when all have their first."""
    handles: list[Handle] = [engine.submit(request) for request in asked]
    while not all(handle.ids for handle in handles):
        engine.step()
    before, start = sum(len(handle.ids) for handle in handles), time.perf_counter()
    engine.run_until_idle()
    assert all(handle.error is None for handle in handles), [h.error for h in handles]
    return (sum(len(handle.ids) for handle in handles) - before) / (time.perf_counter() - start)


def same(engine: Engine, asked: list[Request]) -> str:
    """How many tokens of each answer are the plain engine's, up to the first that is not."""
    found = []
    captured, engine._slots.captured = engine._slots.captured, None
    for now in (None, captured):
        engine._slots.captured = now
        found.append([handle.ids for handle in answer_all(engine, asked)])
    equal = [
        next((at for at, (a, b) in enumerate(zip(*p, strict=True)) if a != b), len(p[0]))
        for p in zip(*found, strict=True)
    ]
    return f"{equal} of {len(found[0][0])}"


def first_token(engine: Engine, first: int = 500) -> list[float]:
    """Milliseconds, of prompts that share nothing."""
    found = []
    for at in range(8):
        (request,) = requests(1, 512, 1, first=first + at)
        torch.cuda.synchronize()
        start = time.perf_counter()
        handle = engine.submit(request)
        while not handle.ids:
            engine.step()
        found.append((time.perf_counter() - start) * 1e3)
        engine.run_until_idle()
    return found[2:]


def answers(decoder: Decoder, name: str) -> None:
    engine = Engine(decoder, tokenizer(), slots=64, cache_tokens=64 * 384)
    with torch.inference_mode():
        slow = rate(engine, requests(1, 32, 24, first=900)) if not engine.plainly else 0.0
    start = time.perf_counter()
    while engine._prepare():
        pass
    torch.cuda.synchronize()
    print(f"{name}: plain {engine.plainly or 'no'}; all graphs recorded in {time.perf_counter() - start:.1f} s")
    print(f"{name}: {slow:.0f} tok/s while being recorded")
    print(f"{name}: tokens equal to the plain engine's: {same(engine, requests(1, 32, 48, first=800))} alone, "
          f"{same(engine, requests(6, 40, 48, first=820))} together", flush=True)  # fmt: skip
    rows = [(1, 32, 224), (4, 128, 128), (16, 128, 128), (64, 128, 128), (64, 112, 128), (64, 64, 128)]
    for count, length, tokens in rows:
        rate(engine, requests(count, length, 16, first=2000))
        best = max(rate(engine, requests(count, length, tokens, first=3000 + 100 * turn)) for turn in range(3))
        print(f"{name}: {count:2d} at once, prompt {length}, answer {tokens}: {best:8.0f} tok/s", flush=True)
    drawn = rate(engine, requests(1, 32, 224, first=4000, temperature=0.3, top_p=0.8, seed=1))
    print(f"{name}:  1 at once, drawn (temperature 0.3, top_p 0.8): {drawn:8.0f} tok/s")
    times = first_token(engine)
    print(f"{name}: first token of 512: best {min(times):.1f} ms, median {statistics.median(times):.1f} ms")
    print(f"{name}: peak {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB", flush=True)


def held(decoder: Decoder, rows: int, length: int) -> tuple[PagedCache, Columns]:
    """A cache in which each row holds `length` random tokens."""
    pages = (length + 64) // PAGE + 1
    cache = PagedCache(decoder.config, rows * pages, decoder.device, decoder.dtype)
    cache.keys.normal_()
    cache.values.normal_()
    table = torch.arange(1, rows * pages + 1).view(rows, pages).flip(0)
    table = torch.cat((table, torch.zeros(1, pages, dtype=torch.int64))).cuda()
    token = torch.arange(rows + 1, device="cuda") * 991 + 5
    position = torch.full((rows + 1,), length, device="cuda")
    position[-1] = 0
    return cache, Columns(token, position, position // 2, torch.full_like(token, -1), table)


@torch.inference_mode()
def check(decoder: Decoder, name: str) -> None:
    """The relative distance of scores, and how many likeliest tokens are the same."""
    for rows, long in ((1, False), (1, True), (4, False), (16, True), (64, False)):
        cache, columns = held(decoder, rows, 230)
        slot, position = torch.arange(rows, device="cuda"), columns.position_S[:rows].clone()
        layout = DecodeLayout(cache, columns.table_SP[:rows], position, position + 1, [(None, 4)])
        plain = decoder.head(decoder.hidden(columns.token_S[:rows], position, layout)).float()
        step = DecodeStep(decoder, cache, columns, rows, 4096)
        step.slot_B.copy_(slot)
        step.run(long)
        scores = step.scores.float()
        step.take_best()
        torch.cuda.synchronize()
        graph, eager = torch.cuda.CUDAGraph(), scores.clone()
        with torch.cuda.graph(graph):
            step.run(long)
            step.take_best()
        columns.token_S[:rows] = torch.arange(rows, device="cuda") * 991 + 5
        same = 0
        for _ in range(20):  # a race would show as a difference between replays
            columns.token_S[:rows] = torch.arange(rows, device="cuda") * 991 + 5
            columns.position_S[:rows] = 230
            graph.replay()
            same += torch.equal(step.scores.float(), eager)
        far = float((scores - plain).norm() / plain.norm())
        agree = int((scores.argmax(-1) == plain.argmax(-1)).sum())
        print(f"check {name}: {rows} rows{', long' * long}: distance {far:.4f}, likeliest equal {agree} of {rows}, "
              f"replays equal {same} of 20", flush=True)  # fmt: skip


PACKS = {  # (start, stop) of each prompt
    "512": [(0, 512)],
    "8 packed": [(0, n) for n in (512, 1, 63, 64, 65, 200, 300, 19)],
    "one continued": [(448, 512), (100, 511), (511, 512)],
}


@torch.inference_mode()
def check_prefill(decoder: Decoder, name: str) -> None:
    """The relative distance of scores, and of what the cache holds, of prompts by hand and by the plain layers."""
    for kind, spans in PACKS.items():
        cache, columns = held(decoder, len(spans), 512)
        asked = requests(len(spans), 512, 1)
        pieces = [Piece(i, a, list(asked[i].prompt_ids[a:b]), True) for i, (a, b) in enumerate(spans)]
        ids = torch.tensor([token for piece in pieces for token in piece.ids], device="cuda")
        position = torch.cat([torch.arange(a, b) for a, b in spans]).cuda()
        parts = [Part(columns.table_SP[i].tolist(), a, b) for i, (a, b) in enumerate(spans)]
        ends = torch.tensor([b - a for a, b in spans]).cumsum(0) - 1
        h = decoder.hidden(ids, position, PrefillLayout(cache, parts, position + 1))
        plain, kept = decoder.head(h[ends.cuda()]).float(), (cache.keys.clone(), cache.values.clone())
        by_hand = Prefill(decoder, cache, columns, 4096)
        scores = by_hand.run(pieces)
        assert scores is not None
        far = float((scores.float() - plain).norm() / plain.norm())
        while by_hand.prepare():
            pass
        replayed = [by_hand.run(pieces).clone() for _ in range(6)]  # type: ignore[union-attr]
        graph_far = float((replayed[0].float() - plain).norm() / plain.norm())
        held_far = [
            float((a[:, 1:].float() - b[:, 1:].float()).norm() / b[:, 1:].float().norm())
            for a, b in zip((cache.keys, cache.values), kept, strict=True)  # page 0 is nobody's
        ]
        agree = int((scores.argmax(-1) == plain.argmax(-1)).sum())
        equal = all(torch.equal(replayed[0], one) for one in replayed)
        print(f"check prefill {name}: {kind}: distance {far:.4f}, recorded {graph_far:.4f}, keys {held_far[0]:.4f}, "
              f"values {held_far[1]:.4f}, likeliest {agree} of {len(spans)}, replays equal {equal}")  # fmt: skip


@torch.inference_mode()
def prefill(decoder: Decoder, name: str) -> None:
    """First tokens of 512 by hand and plainly; the host's and the device's share of a prefill."""
    check_prefill(decoder, name)
    engine = Engine(decoder, tokenizer(), slots=64, cache_tokens=64 * 384)
    by_hand = engine._slots.by_hand
    assert by_hand is not None, engine.plainly
    plain = first_token(engine)
    start = time.perf_counter()
    while by_hand.prepare():
        pass
    torch.cuda.synchronize()
    print(f"prefill {name}: prepared in {time.perf_counter() - start:.1f} s")
    ours = first_token(engine, 600)
    print(f"prefill {name}: first token of 512: best {min(ours):.2f} ms, median {statistics.median(ours):.2f} ms; "
          f"plain {min(plain):.2f}, {statistics.median(plain):.2f} ms", flush=True)  # fmt: skip
    for count, length in ((1, 64), (1, 512), (1, 1024), (8, 512), (8, 1024)):
        by_row = [Piece(i, 0, list(r.prompt_ids), True) for i, r in enumerate(requests(count, length, 1))]
        found = []
        for _ in range(8):
            torch.cuda.synchronize()
            start = time.perf_counter()
            by_hand.run(by_row)
            given = time.perf_counter()
            torch.cuda.synchronize()
            found.append(((time.perf_counter() - start) * 1e3, (given - start) * 1e3))
        whole, host = min(found)
        print(f"   {count} x {length}: {whole:.2f} ms, of it the host's launches {host:.2f} ms", flush=True)
        if (count, length) == (1, 512):
            with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as seen:
                by_hand.run(by_row)
                torch.cuda.synchronize()
            events = sorted((e for e in seen.key_averages() if e.device_time_total), key=lambda e: -e.device_time_total)
            busy = sum(e.device_time_total for e in events)
            print(f"   {busy / 1e3:.2f} ms of kernels, {sum(e.count for e in events)} launches; the longest:")
            for event in events[:8]:
                print(f"   {event.device_time_total:8.0f} us  {event.count:4d} x  {event.key[:90]}")


def microseconds(call: Callable[[], object], times: int = 1) -> float:
    """A call's time inside a graph."""
    call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    graph.replay()
    best = float("inf")
    for _ in range(3):
        start.record()
        for _ in range(5):
            graph.replay()
        stop.record()
        torch.cuda.synchronize()
        best = min(best, start.elapsed_time(stop) * 1e3 / times / 5)
    return best


def launches(step: DecodeStep) -> Iterator[tuple[str, Callable[[], object], int, float]]:
    """(name, what runs it in every layer, launches, bytes of a launch) of the kernels of one row's step."""
    d, gain = step.decoder, step.decoder.config.residual_multiplier

    def size(linear: Any) -> float:
        if isinstance(linear, Int4Linear):
            return linear.weight_packed.numel() * 4 + linear.weight_scale.numel() * 2
        return linear.weight.numel() * 2

    four = ", 4 bits" if isinstance(d.layers[0].attn.qkv, Int4Linear) else ""
    kinds: dict[str, Callable[[Any], object]] = {
        "qkv": lambda y: step._multiply("qkv", step.x, y.attn.qkv, step.qkv, norm=y.attn_norm),
        "o": lambda y: step._multiply("o", step.y, y.attn.o, step.x, gain=gain),
        "gate_up": lambda y: step._multiply("gate_up", step.x, y.mlp.gate_up, step.act, norm=y.mlp_norm, silu=True),
        "down": lambda y: step._multiply("down", step.act, y.mlp.down, step.x, gain=gain),
    }
    for name, call in kinds.items():
        of = getattr(d.layers[0].attn if name in ("qkv", "o") else d.layers[0].mlp, name)
        yield name + four, lambda call=call: [call(layer) for layer in step.layers], len(step.layers), size(of)
    v = d.config.vocab_size
    head = lambda: step._gemv("head", step.x, d.head_weight, step.logits[:, :v], 1.0, d.norm, False, False)  # noqa: E731
    yield "head", head, 1, d.head_weight.numel() * 2


@torch.inference_mode()
def profile(decoder: Decoder, name: str) -> None:
    """Each kernel of a step by itself in a graph of its forty launches; the step with and without overlap (PDL)."""
    kept = decode.PDL
    for rows in (1, 4, 16, 64):
        for pdl in (True, False)[not kept :]:
            decode.PDL = pdl
            cache, columns = held(decoder, rows, 190)
            step = DecodeStep(decoder, cache, columns, rows, 4096)
            step.slot_B.copy_(torch.arange(rows))
            whole = microseconds(lambda s=step: s.run(False))
            columns.position_S.fill_(190)
            best = microseconds(step.take_best)
            print(f"profile {name}: {rows} rows, PDL {pdl}: step {whole:.0f} us, {rows / whole * 1e6:.0f} tok/s; "
                  f"likeliest {best:.1f} us", flush=True)  # fmt: skip
            step._enter()
            us = microseconds(lambda s=step: [s._attend(i, False) for i in range(40)], 40)
            print(f"   attend   {us:6.1f} us  {rows * 191 * 36 * 64 * 4 / us / 1e3:6.0f} GB/s")
            if rows == 1:
                for kind, call, count, size in launches(step):
                    us = microseconds(call, count)
                    print(f"   {kind:16s} {us:6.1f} us  {size / us / 1e3:6.0f} GB/s", flush=True)
        decode.PDL = kept
        if rows > 1:
            table_of(step)
            continue
        for long in (False, True):
            us = microseconds(lambda s=step, long=long: s.run(long))
            print(f"   step, long {long}: {us:.0f} us")


def table_of(step: DecodeStep) -> None:
    """torch.profiler's view of a step of several rows."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as seen:
        step.columns.position_S.fill_(190)
        step.run(False)
        torch.cuda.synchronize()
    found = sorted(seen.key_averages(), key=lambda e: -e.device_time_total)[:10]
    for event in found:
        print(f"   {event.device_time_total:8.0f} us  {event.count:4d} x  {event.key[:70]}")


def compile_all(step: DecodeStep) -> None:
    """All tiles at once, on all processors."""
    step.layers = step.layers[:1]
    with ThreadPoolExecutor(16) as pool:
        try:
            with kernels.compiling(pool):
                for name, call, _, _ in launches(step):
                    kept = decode.TILES[name]
                    for tile in CANDIDATES[name]:
                        decode.TILES[name] = tile
                        call()
                    decode.TILES[name] = kept
        except Exception as error:  # the one that is at fault is named when it is tried
            print(f"   compiling: {type(error).__name__}: {str(error)[:80]}")


@torch.inference_mode()
def tune(decoder: Decoder, seconds: float = 60.0) -> None:
    start = time.perf_counter()
    cache, columns = held(decoder, 1, 190)
    step = DecodeStep(decoder, cache, columns, 1, 4096)
    step.slot_B.zero_()
    compile_all(DecodeStep(decoder, cache, columns, 1, 4096))
    print(f"compiled in {time.perf_counter() - start:.0f} s; step {microseconds(lambda: step.run(False)):.0f} us")
    for name, call, count, size in launches(step):
        kept, found = decode.TILES[name], {}
        for tile in [kept, *(t for t in CANDIDATES[name] if t != kept)]:
            if time.perf_counter() - start > seconds:
                break
            decode.TILES[name] = tile
            try:
                found[tile] = microseconds(call, count)
            except Exception as error:  # too many registers: not a candidate
                print(f"   {name} {tuple(tile)}: {type(error).__name__}")
        decode.TILES[name] = kept
        if found:
            best = min(found, key=found.__getitem__)
            decode.TILES[name] = best
            print(f"tune {name:16s} now {found.get(kept, float('nan')):6.1f}, best {found[best]:6.1f} us "
                  f"{tuple(best)}, {size / found[best] / 1e3:.0f} GB/s", flush=True)  # fmt: skip
            print("   " + "  ".join(f"{tuple(t)}:{us:.1f}" for t, us in sorted(found.items(), key=lambda p: p[1])))
    print(f"tune: step {microseconds(lambda: step.run(False)):.0f} us")
    kept, by_split = decode.ATTEND, {}
    for split in SPLITS:
        decode.ATTEND = {1: split}
        step = DecodeStep(decoder, cache, columns, 1, 4096)
        step.slot_B.zero_()
        columns.position_S.fill_(190)
        step._enter()
        us = microseconds(lambda s=step: [s._attend(i, False) for i in range(40)], 40)
        by_split[split] = microseconds(lambda s=step: s.run(False)), us
    decode.ATTEND = kept
    text = "  ".join(f"{tuple(t)}:{w:.0f},{us:.1f}" for t, (w, us) in sorted(by_split.items(), key=lambda p: p[1]))
    print(f"tune attend (step, by itself): {text}", flush=True)


@torch.inference_mode()
def transformers_side() -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=SHAPE.vocab_size, hidden_size=SHAPE.hidden_size, intermediate_size=SHAPE.intermediate_size,
        num_hidden_layers=40, num_attention_heads=36, num_key_value_heads=36, max_position_embeddings=4096,
        tie_word_embeddings=True, bos_token_id=1, eos_token_id=2, pad_token_id=2,
    )  # fmt: skip
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda"):
        model = LlamaForCausalLM(config).eval()
    torch.set_default_dtype(torch.float32)

    def run(count: int, length: int, tokens: int) -> float:
        ids = torch.tensor([r.prompt_ids for r in requests(count, length, tokens)], device="cuda")
        torch.cuda.synchronize()
        start = time.perf_counter()
        model.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, min_new_tokens=tokens, max_new_tokens=tokens
        )
        torch.cuda.synchronize()
        return time.perf_counter() - start

    run(1, 32, 4)
    for count, length in ((1, 32), (64, 128)):
        run(count, length, 2)
        seconds = run(count, length, 33) - run(count, length, 1)
        print(f"transformers, dynamic cache: {count:2d} at once, prompt {length}: {count * 32 / seconds:8.1f} tok/s")
    print(f"transformers: first token of 512: {min(run(1, 512, 1) for _ in range(4)) * 1e3:.1f} ms", flush=True)


def attempt(name: str, part: Callable[[], object]) -> None:
    start = time.perf_counter()
    try:
        part()
    except Exception:
        print(f"{name} FAILED:\n{traceback.format_exc()}", flush=True)
    gc.collect()
    torch.cuda.empty_cache()
    print(f"[{name}: {time.perf_counter() - start:.0f} s]", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", default="check,bf16,int4,transformers")
    parser.add_argument("--tune", default="", help="bf16, int4 or both: tiles tried, the best used by what follows")
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--no-pdl", action="store_true", help="kernels do not overlap")
    arguments = parser.parse_args()
    decode.PDL = not arguments.no_pdl
    print(torch.cuda.get_device_name(), "torch", torch.__version__, flush=True)
    parts, tuned = arguments.parts.split(","), arguments.tune.split(",")
    both = ("bf16", "int4")
    for name in [n for n in both if n in parts or n in tuned] or [n for n in both if set(parts) != {"transformers"}]:
        decoder = decoder_of(name == "int4")
        if "check" in parts:
            attempt(f"check {name}", lambda d=decoder, n=name: check(d, n))
        if "prefill" in parts:
            attempt(f"prefill {name}", lambda d=decoder, n=name: prefill(d, n))
        if name in tuned:
            attempt(f"tune {name}", lambda d=decoder: tune(d))
        if arguments.profile:
            attempt(f"profile {name}", lambda d=decoder, n=name: profile(d, n))
        if name in parts:
            attempt(f"answers {name}", lambda d=decoder, n=name: answers(d, n))
        del decoder
        gc.collect()
        torch.cuda.empty_cache()
    if "transformers" in parts:
        attempt("transformers", transformers_side)


if __name__ == "__main__":
    main()
