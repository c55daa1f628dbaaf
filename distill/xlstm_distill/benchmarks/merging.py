"""Measure a merge of sharded experts with random weights: peak memory, and speed against a copy.

`python -m xlstm_distill.benchmarks.merging FOLDER` writes experts of the shapes of Llama-3.2-1B
(1.24B parameters) into a new folder, merges them in a process of its own, and removes the folder.
Speeds count bytes read and written. Processor seconds, of all threads, say what a merge computes
where other work takes the cores, or where the disk is slow. docs/merging.md has the results.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file

from xlstm_distill.artifacts.files import flush_tree
from xlstm_distill.merging.files import INDEX, NewWeights, SavedWeights
from xlstm_distill.merging.merge import MergePlan, Sources, merge_files
from xlstm_distill.merging.streaming import threads

HIDDEN, INNER, HEADS_OF_KEYS, VOCABULARY, LAYERS = 2048, 8192, 512, 128_256, 16
LAYER = {
    "self_attn.q_proj": (HIDDEN, HIDDEN),
    "self_attn.k_proj": (HEADS_OF_KEYS, HIDDEN),
    "self_attn.v_proj": (HEADS_OF_KEYS, HIDDEN),
    "self_attn.o_proj": (HIDDEN, HIDDEN),
    "mlp.gate_proj": (INNER, HIDDEN),
    "mlp.up_proj": (INNER, HIDDEN),
    "mlp.down_proj": (HIDDEN, INNER),
    "input_layernorm": (HIDDEN,),
}
LAYERS_OF_A_FILE = 4
METHODS = ("linear", "task_arithmetic", "ties", "dare")


def write_model(folder: Path, seed: int, layers: int, vocabulary: int) -> None:
    """Write a model of random bf16 weights in several files."""
    folder.mkdir(parents=True)
    generator = torch.Generator().manual_seed(seed)
    place: dict[str, str] = {}

    def write(number: int, shapes: dict[str, tuple[int, ...]]) -> None:
        file = f"model-{number:05}.safetensors"
        tensors = {}
        for name, shape in shapes.items():
            drawn = torch.empty(shape, dtype=torch.float32).uniform_(-1, 1, generator=generator)
            tensors[name] = drawn.bfloat16()
        save_file(tensors, folder / file, {"format": "pt"})
        place.update(dict.fromkeys(tensors, file))

    write(0, {"model.embed_tokens.weight": (vocabulary, HIDDEN)})
    for start in range(0, layers, LAYERS_OF_A_FILE):
        shapes: dict[str, tuple[int, ...]] = {}
        for layer in range(start, min(start + LAYERS_OF_A_FILE, layers)):
            names = {f"model.layers.{layer}.{name}.weight": size for name, size in LAYER.items()}
            shapes |= names
        write(start + 1, shapes)
    (folder / INDEX).write_text(json.dumps({"weight_map": place}))


def merge(folder: Path, method: str, experts: int) -> dict[str, float]:
    """Merge in this process; return seconds, bytes and the peak of its memory."""
    names = [str(number) for number in range(experts)]
    plan = MergePlan(method, dict.fromkeys(names, 1 / experts), density=0.2)
    sources = Sources(
        {name: SavedWeights(folder / name) for name in names}, SavedWeights(folder / "base")
    )
    target = NewWeights(sources.experts["0"], folder / "merged")
    seconds, processor = timed(lambda: merge_files(plan, sources, target))
    flushed, _ = timed(lambda: flush_tree(folder / "merged"))
    read = experts + (method != "linear")
    return {
        "seconds": seconds,
        "processor": processor,
        "with_flush": seconds + flushed,
        "bytes": target.bytes * (read + 1),
        "peak": peak_memory(),
    }


def peak_memory() -> int:
    """Most memory that this process has held, mapped files included (bytes; Linux)."""
    # Not `ru_maxrss`, which begins with that of the process that started this one.
    facts = Path("/proc/self/status").read_text().splitlines()
    peak = next(line for line in facts if line.startswith("VmHWM"))
    return int(peak.split()[1]) * 1024


def copy(folder: Path) -> dict[str, float]:
    """Copy an expert with the system's own means."""
    seconds, processor = timed(lambda: shutil.copytree(folder / "0", folder / "copy"))
    flushed, _ = timed(lambda: flush_tree(folder / "copy"))
    size = sum(path.stat().st_size for path in (folder / "copy").iterdir())
    shutil.rmtree(folder / "copy")
    return {
        "seconds": seconds,
        "processor": processor,
        "with_flush": seconds + flushed,
        "bytes": 2 * size,
    }


def timed(work: Callable[[], object]) -> tuple[float, float]:
    """Seconds, and processor seconds of all threads, that a piece of work takes."""
    started, used = time.perf_counter(), time.process_time()
    work()
    return time.perf_counter() - started, time.process_time() - used


def line(name: str, found: dict[str, float]) -> str:
    """One line of the table."""
    size, peak = found["bytes"] / 1e9, found.get("peak")
    memory = "" if peak is None else f"{peak / 2**30:.2f}"
    return (
        f"| {name} | {found['seconds']:.1f} | {size / found['seconds']:.2f} "
        f"| {size / found['with_flush']:.2f} | {found['processor']:.1f} "
        f"| {size / found['processor']:.2f} | {memory} |"
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Print a table in Markdown."""
    parser = argparse.ArgumentParser(
        prog="python -m xlstm_distill.benchmarks.merging", description=__doc__
    )
    parser.add_argument("folder", type=Path, help="a new folder, with room for 7 models")
    parser.add_argument("--experts", type=int, default=4)
    parser.add_argument("--layers", type=int, default=LAYERS)
    parser.add_argument("--vocabulary", type=int, default=VOCABULARY)
    parser.add_argument("--methods", nargs="+", default=["linear"], choices=METHODS)
    parser.add_argument("--merge", choices=METHODS, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.merge:
        print(json.dumps(merge(options.folder, options.merge, options.experts)))
        return
    options.folder.mkdir()
    try:
        names = ["base", *(str(number) for number in range(options.experts))]
        for seed, name in enumerate(names):
            write_model(options.folder / name, seed, options.layers, options.vocabulary)
        flush_tree(options.folder)
        print(f"{threads()} threads")
        head = ["", "seconds", "GB/s", "GB/s, flushed to disk", "processor seconds"]
        head += ["GB per processor second", "peak memory, GiB"]
        print(f"| {' | '.join(head)} |\n{'|---' * len(head)}|")
        print(line("copy of one expert", copy(options.folder)), flush=True)
        for method in options.methods:
            # A process of its own: the peak is the merge's alone.
            command = [
                sys.executable,
                "-m",
                "xlstm_distill.benchmarks.merging",
                str(options.folder),
            ]
            command += ["--merge", method, "--experts", str(options.experts)]
            done = subprocess.run(command, check=True, capture_output=True, text=True)
            print(line(method, json.loads(done.stdout)), flush=True)
            shutil.rmtree(options.folder / "merged")
        print(line("copy of one expert, again", copy(options.folder)))
    finally:
        shutil.rmtree(options.folder)


if __name__ == "__main__":
    main()
