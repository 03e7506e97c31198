"""Speed at published shapes with random weights, beside transformers and the released loop in the same run.

    python -m benchmarks.published all --output published.json      linear and audio; one 80 GB GPU, a table at the end
    python -m benchmarks.published linear       decoding, Kimi-Linear's shape, 32k context, batch 16, 8 of its 27 layers
    python -m benchmarks.published audio        a spoken reply, Kimi-Audio's shape: first sound, codes a second
    python -m benchmarks.published cpu          Kimi-Audio's shape in int8 on a CPU: memory, seconds a token
    python -m benchmarks.published all --debug  tiny, on any machine

Both sides get the same shape, context, settings and number of steps, one after the other. transformers runs Kimi-Linear
as it ships. Kimi-Audio it does not have: beside us runs the released loop on transformers' layers
(`benchmarks.published_loop`). Context is put into the caches as random rows; time does not depend on what they hold.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

import torch

from benchmarks.published_loop import PublishedLM, released_loop
from benchmarks.published_shapes import Row, clock, drawn, free, peak, quantiles, save, shaped, timed, where
from kimi_mm.audio.detokenizer import Detokenizer
from kimi_mm.audio.detokenizer_published import CHUNK, published_pieces
from kimi_mm.config import ModelConfig
from kimi_mm.generation_graphs import Steps
from kimi_mm.generation_speech import SpeechSampling, TwoStreams
from kimi_mm.model import Model
from kimi_mm.processing import ModelInputs
from kimi_mm.text.cache import BackboneCache, SequenceState

GIB = 2**30
PROMPT = 256  # positions of the spoken question


# ---- Kimi-Linear -----------------------------------------------------------------------------------------------------


@torch.inference_mode()
def linear(options: argparse.Namespace) -> list[Row]:
    """Decoding steps behind a long context, ours by launches and by graphs, then transformers'."""
    config = shaped("linear", options.layers or (None if options.debug else 8), options.debug)
    device, batch, context = options.device, options.batch, options.context
    model = drawn(config, device, options.dtype)
    rows: list[Row] = []
    for name, graphs in (("eager", False), ("graphs", True)):
        if graphs and not device.startswith("cuda"):
            continue
        measured = our_steps(model, options, graphs)
        rows.append(_speed(f"kimi_mm, {name}", measured, batch) | {"peak_gib": peak(device)})
    del model
    free(device)
    rows.append(_speed("transformers", transformers_steps(config, options), batch) | {"peak_gib": peak(device)})
    free(device)
    facts: Row = {"what": f"Kimi-Linear decode, {len(config.backbone.trunk)} layers, batch {batch}, context {context}"}
    return _beside([facts | row for row in rows], "tokens_per_s")


def our_steps(model: Model, options: argparse.Namespace, graphs: bool) -> Row:
    """Steps behind a filled cache, each choosing the likeliest id."""
    steps = Steps(model, filled(model, options.batch, options.context), room=options.steps + 8, graphs=graphs)
    token = torch.zeros(options.batch, dtype=torch.int64, device=options.device)

    def step() -> None:
        hidden = steps(token, token).text_hidden
        token.copy_(model.backbone.text_logits(hidden)[:, -1].argmax(-1))

    measured = timed(step, options.steps, options.device)
    steps.close()
    return measured


def filled(model: Model, batch: int, context: int) -> BackboneCache:
    """A cache of `context` random rows."""
    cache = model.backbone.new_cache(batch)
    for state in cache.layers:
        if isinstance(state, SequenceState):
            state.rows = state.rows.new_empty(batch, context, *state.rows.shape[2:]).normal_()
    cache.lengths += context
    cache.max_length = context
    return cache


def transformers_steps(config: ModelConfig, options: argparse.Namespace) -> Row:
    """transformers' Kimi-Linear of the same shape: a short prompt, its cache made as long as ours, then steps."""
    import transformers

    b, device = config.backbone, options.device
    assert b.kda
    assert b.mla
    assert b.moe
    theirs = transformers.KimiLinearConfig(
        vocab_size=b.vocab_size,
        hidden_size=b.hidden_size,
        intermediate_size=b.intermediate_size,
        num_hidden_layers=len(b.trunk),
        num_attention_heads=b.mla.num_heads,
        num_key_value_heads=b.mla.num_heads,
        q_lora_rank=None,
        kv_lora_rank=b.mla.kv_lora_rank,
        qk_nope_head_dim=b.mla.qk_nope_head_dim,
        qk_rope_head_dim=b.mla.qk_rope_head_dim,
        v_head_dim=b.mla.v_head_dim,
        moe_intermediate_size=b.moe.intermediate_size,
        num_local_experts=b.moe.num_experts,
        num_experts_per_tok=b.moe.num_experts_per_token,
        linear_head_dim=b.kda.head_dim,
        linear_num_heads=b.kda.num_heads,
        layer_types=["linear_attention" if kind.startswith("kda") else "full_attention" for kind in b.trunk],
        mlp_layer_types=["sparse" if kind.endswith("moe") else "dense" for kind in b.trunk],
        pad_token_id=0,
    )
    before = torch.get_default_dtype()
    torch.set_default_dtype(options.dtype)
    try:
        with torch.device(device):
            model = transformers.KimiLinearForCausalLM(theirs).eval()
    finally:
        torch.set_default_dtype(before)
    cache = model(torch.zeros(options.batch, 8, dtype=torch.int64, device=device), use_cache=True).past_key_values
    for layer in cache.layers:
        if isinstance(getattr(layer, "keys", None), torch.Tensor):
            for name in ("keys", "values"):
                old = getattr(layer, name)
                shape = (*old.shape[:2], options.context, old.shape[3])
                setattr(layer, name, old.new_empty(shape).normal_())
    assert cache.get_seq_length() == options.context
    token = torch.zeros(options.batch, 1, dtype=torch.int64, device=device)

    def step() -> None:
        token.copy_(model(token, past_key_values=cache, use_cache=True).logits[:, -1:].argmax(-1))

    return timed(step, options.steps, device)


# ---- Kimi-Audio ------------------------------------------------------------------------------------------------------


def audio(options: argparse.Namespace) -> list[Row]:
    """A spoken reply: time to the first sound, and steps; ours by launches and graphs, then the released loop."""
    config = shaped("audio", options.layers, options.debug, voice=True)
    device = options.device
    model = drawn(config, device, options.dtype)
    model.config = config.replace(hears=True)  # two streams, though nothing tokenizes audio here
    detokenizer = model.detokenizer
    assert detokenizer is not None
    ids = torch.randint(0, 200, (2, 1, PROMPT if not options.debug else 16), device=device)
    # As published, and as little as the training of chunks from 0.5 s on allows, with the report's look-ahead.
    published = detokenizer.config.streaming
    soon = published.replace(first_chunk_codes=10, look_ahead_codes=4)
    rows = []
    for name, graphs, settings in (
        ("kimi_mm, eager, chunks as released", False, published),
        ("kimi_mm, graphs, chunks as released", True, published),
        ("kimi_mm, graphs, first chunk of 10 codes", True, soon),
    ):
        if graphs and not device.startswith("cuda") and not options.debug:
            continue
        detokenizer.use_cuda_graphs(graphs)
        for _ in range(2):  # graphs are captured, kernels compiled
            list(_events(model, detokenizer, ids, settings, graphs, options.steps))
        rounds = [_reply(model, detokenizer, ids, settings, graphs, options) for _ in range(options.rounds)]
        rows.append({"who": name} | _summary(rounds) | {"peak_gib": peak(device)})
    del model.backbone
    free(device)
    theirs = PublishedLM(config, device, options.dtype)
    detokenizer.use_cuda_graphs(False)
    for _ in range(2):
        released = [_released(theirs, config, detokenizer, ids, options) for _ in range(options.rounds)]
    rows.append({"who": "released loop"} | _summary(released) | {"peak_gib": peak(device)})
    del theirs, model, detokenizer
    free(device)
    backbone = config.backbone
    layers = len(backbone.trunk) + len(backbone.text_branch) + len(backbone.audio_branch)
    facts: Row = {"what": f"Kimi-Audio spoken reply, {layers} layers, prompt {ids.shape[2]}"}
    rows = _beside([facts | row for row in rows], "tokens_per_s")
    for row in rows:
        row["first_sound_times_sooner"] = round(float(rows[-1]["first_sound_s"]) / float(row["first_sound_s"]), 2)  # type: ignore[arg-type]
    return rows


def _events(
    model: Model, detokenizer: Detokenizer, ids: torch.Tensor, settings, graphs: bool, count: int
) -> Iterator[int]:
    """Yields, step by step, how many samples of sound came out."""
    most = settings.first_chunk_codes + count
    sampling = SpeechSampling(max_audio_codes=most, min_audio_codes=most, max_text_tokens=most + 6)
    inputs = ModelInputs(ids[0], ids[1], torch.tensor([ids.shape[2]], device=ids.device))
    out = detokenizer.stream(streaming=settings)
    use = graphs if ids.is_cuda else None
    for [step] in TwoStreams(model, inputs, sampling=sampling, graphs=use):
        yield 0 if step.code is None else len(out.push([step.code]))


def _reply(model: Model, detokenizer: Detokenizer, ids: torch.Tensor, settings, graphs: bool, options) -> dict:
    start, first, times = clock(options.device), 0.0, []
    mark = start
    for samples in _events(model, detokenizer, ids, settings, graphs, options.steps):
        now = clock(options.device)
        if samples and not first:
            first = now - start
        if first and not samples:  # steps of the language model alone
            times.append(1000 * (now - mark))
        mark = clock(options.device)
    return {"first": first, "times": times}


def _released(theirs: PublishedLM, config: ModelConfig, detokenizer: Detokenizer, ids: torch.Tensor, options) -> dict:
    blank, offset = config.vocab.special("text_blank"), config.vocab.audio_offset
    start, codes = clock(options.device), []
    loop = released_loop(theirs, ids, config.audio_delay, blank, offset)
    while len(codes) < CHUNK:
        code = next(loop)
        if code is not None:
            codes.append(code % config.vocab.num_audio_codes)
    # The first call of many: what it keeps is heard once its first half is out.
    next(published_pieces(detokenizer, [*codes, 0]))
    first, times = clock(options.device) - start, []
    for _ in range(options.steps):
        mark = clock(options.device)
        next(loop)
        times.append(1000 * (clock(options.device) - mark))
    return {"first": first, "times": times}


def _summary(rounds: list[dict]) -> Row:
    firsts = sorted(found["first"] for found in rounds)
    times = quantiles([ms for found in rounds for ms in found["times"]])
    return {"first_sound_s": round(firsts[len(firsts) // 2], 4)} | _speed("", times, 1, named=False)


# ---- on a CPU --------------------------------------------------------------------------------------------------------


@torch.inference_mode()
def cpu(options: argparse.Namespace) -> list[Row]:
    """Kimi-Audio's shape in int8: a prompt of 32 positions, then steps of both streams; gives up without the memory."""
    config = shaped("audio", options.layers, options.debug)
    need, there = _int8_bytes(config) + 2.5 * GIB, _available()
    if need > there:
        raise SystemExit(
            f"published cpu: needs {need / GIB:.1f} GiB, {there / GIB:.1f} GiB are free; take fewer layers (--layers)."
        )
    started = clock("cpu")
    model = drawn(config, "cpu", torch.bfloat16, "int8")
    built = clock("cpu") - started
    backbone, cache = model.backbone, model.backbone.new_cache(1)
    ids = torch.randint(0, 200, (2, 1, 32))

    def step(text: torch.Tensor, audio: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        output = backbone(backbone.embed(text, audio), cache=cache)
        assert output.audio_hidden is not None
        logits = backbone.text_logits(output.text_hidden[:, -1:]), backbone.audio_logits(output.audio_hidden[:, -1:])
        return logits[0].argmax(-1), logits[1].argmax(-1)

    started = clock("cpu")
    last = step(ids[0], ids[1])
    prefill = clock("cpu") - started

    def run() -> None:
        nonlocal last
        last = step(*last)

    measured = timed(run, options.steps, "cpu", warm=1)
    layers = len(backbone.decoder_layers())
    facts: Row = {"what": f"Kimi-Audio in int8 on a CPU, {layers} layers", "who": "kimi_mm, int8"}
    parts: Row = {"built_s": round(built, 1), "prefill_32_s": round(prefill, 2), "peak_gib": peak("cpu")}
    return [facts | parts | {"s_per_token": round(float(measured["p50_ms"]) / 1000, 3)} | measured]  # type: ignore[arg-type]


def _int8_bytes(config: ModelConfig) -> int:
    """Of the weights: matrices in one byte, the table of ids in two."""
    with torch.device("meta"):
        model = Model(config)
    return sum(
        parameter.numel() * (1 if parameter.dim() == 2 and "embed" not in name else 2)
        for name, parameter in model.named_parameters()
    )


def _available() -> int:
    """Bytes of main memory that a process can get."""
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return 2**62


# ---- the report ------------------------------------------------------------------------------------------------------


def _speed(who: str, measured: Row, batch: int, named: bool = True) -> Row:
    rate: Row = {"tokens_per_s": round(1000 * batch / float(measured["p50_ms"]), 1)}  # type: ignore[arg-type]
    return ({"who": who} if named else {}) | measured | rate


def _beside(rows: list[Row], key: str) -> list[Row]:
    """Adds to every row how many times the last one's rate it has."""
    return [row | {"times": round(float(row[key]) / float(rows[-1][key]), 2)} for row in rows]  # type: ignore[arg-type]


COLUMNS = (
    ("who", "who", 42),
    ("first_sound_s", "first sound s", 14),
    ("p50_ms", "step ms p50", 12),
    ("p99_ms", "p99", 9),
    ("tokens_per_s", "tokens/s", 10),
    ("times", "x", 7),
    ("first_sound_times_sooner", "x sooner", 9),
    ("s_per_token", "s/token", 8),
    ("peak_gib", "GiB", 7),
)


def table(rows: list[Row]) -> str:
    """The rows for people; columns that none has are left out."""
    used = [column for column in COLUMNS if any(column[0] in row for row in rows)]
    lines, last = [], ""
    for row in rows:
        if row["what"] != last:
            last = str(row["what"])
            lines += [
                last,
                "  " + "".join(f"{title:<{w}}" if key == "who" else f"{title:>{w}}" for key, title, w in used),
            ]
        cells = (f"{row.get(key, ''):<{w}}" if key == "who" else f"{row.get(key, ''):>{w}}" for key, _, w in used)
        lines.append("  " + "".join(cells))
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    """Measures and prints a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=("linear", "audio", "cpu", "all"))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--layers", type=int, default=None, help="fewer layers than published")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--context", type=int, default=32_768)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--rounds", type=int, default=3, help="spoken replies that the first sound is the median of")
    parser.add_argument("--debug", action="store_true", help="tiny sizes")
    parser.add_argument("--output", type=Path, default=None, help="JSON file for everything measured")
    options = parser.parse_args(arguments)
    options.dtype = torch.float32 if options.debug else torch.bfloat16
    if options.debug:
        options.batch, options.context, options.steps, options.rounds = 2, 64, 4, 1
    torch.manual_seed(0)
    rows: list[Row] = []
    for kind, run in (("linear", linear), ("audio", audio), ("cpu", cpu)):
        if options.kind == kind or (options.kind == "all" and kind != "cpu"):
            rows += run(options)
            if options.output is not None:
                save(options.output, rows, options.device, sys.argv[1:] if arguments is None else arguments)
    print(f"{where(options.device)}, torch {torch.__version__}")
    print(table(rows))


if __name__ == "__main__":
    main()
