"""`make bench-quality`: do token weights help? Trains every kind of policy in worlds with known rewards, and compares them.

The runs are in `benchmarks/scratch/quality/`, one line for each policy; a second call goes on where the first one stopped. The
result file and the figures are made from all of them.
"""

import argparse
import json
import math
import os
import sys
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

REPO = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(REPO))
SCRATCH = REPO / "benchmarks" / "scratch" / "quality"
RESULTS = REPO / "benchmarks" / "results"
TITLES = {
    "planted-sparse-1000-0": "planted, sparse",
    "toy": "the demo's language",
    "tiny": "real language, 8 M parameters",
    "real": "real language, 135 M parameters",
}
"""Worlds in the figures."""
REPORTING_SEEDS = (1, 2, 3, 4, 5)
"""Fixed before anything was run with them; seed 0 was for trying out."""


def jobs(arguments: argparse.Namespace) -> list[tuple[str, Callable[[], object], Mapping[str, int]]]:
    """Return every world and seed: a name for its file, how to make it, and of which families how many settings to train."""
    from benchmarks.quality import methods, worlds

    scratch, samples = arguments.scratch, {"num_samples": arguments.samples}
    instructions = arguments.shared / "data" / "alpaca_judged.parquet"
    found: list[tuple[str, Callable[[], object], Mapping[str, int]]] = []
    for seed in arguments.seeds:
        if "tiny" in arguments.worlds:
            texts = worlds.instructions_of(instructions)
            model = arguments.shared / "models" / "tiny-chat"
            found.append(
                (f"tiny-{seed}", partial(worlds.tiny, model, texts, seed, num_other=2000, **samples), methods.TINY)
            )
        if "toy" in arguments.worlds:
            make = partial(worlds.toy, scratch / "toy-model", seed, num_other=2000, **samples)
            found.append((f"toy-{seed}", make, methods.TOY))
        if "planted" in arguments.worlds:
            for kind, num_pairs, flips in PLANTED:
                cell = f"{kind}-{num_pairs}-{flips:g}"
                if arguments.cells and cell not in arguments.cells:
                    continue
                first = (kind, num_pairs, flips) == PLANTED[0]
                families = methods.PLANTED if first else methods.CELL
                how_many = {"num_pairs": num_pairs, "num_other": 4000 if first else 0, "flips": flips, **samples}
                make = partial(worlds.planted, scratch / "planted-model", kind, seed, **how_many)
                found.append((f"planted-{cell}-{seed}", make, families))
        if "real" in arguments.worlds:
            where = {"device": arguments.device, "dtype": arguments.dtype}
            texts = worlds.instructions_of(instructions)
            make = partial(worlds.real, Path(arguments.model), texts, seed, num_other=3000, **samples, **where)
            found.append((f"real-{seed}", make, methods.REAL))
    return found


PLANTED = [
    *((kind, 1000, 0.0) for kind in ("sparse", "dense", "topic", "previous")),
    ("sparse", 250, 0.0),
    ("sparse", 8000, 0.0),
    ("sparse", 1000, 0.2),
    ("previous", 4000, 0.0),
]
"""Cells of the planted world: kind of rewards, number of pairs, share of flipped labels."""


def report(folder: Path, results: Path) -> None:
    """Write `quality.json`, the tables and the figures from all runs in a folder, and print the tables."""
    from benchmarks.machine import describe
    from benchmarks.quality.close_look import summarise_close_looks
    from benchmarks.quality.figures import draw_curves, draw_gaps, draw_ranking, draw_steps, draw_wins
    from benchmarks.quality.summary import summarise
    from benchmarks.quality.worlds import KLS

    paths: dict[str, list[Path]] = {}
    for path in sorted(folder.glob("*.jsonl")):
        paths.setdefault(path.stem.rsplit("-", 1)[0], []).append(path)
    kls = {world: KLS[world.split("-")[0]] for world in paths}
    summaries = {
        world: summarise(of_world, kls[world]) | {"close_look": summarise_close_looks(of_world)}
        for world, of_world in paths.items()
    }
    found = {"machine": describe("torch", "transformers", "numpy"), "worlds": summaries}
    results.mkdir(parents=True, exist_ok=True)
    text = json.dumps(found, indent=1, sort_keys=True).replace("NaN", "null")
    (results / "quality.json").write_text(text + "\n")
    shown = {title: world for world, title in TITLES.items() if len(paths.get(world, ())) > 1}
    if shown:
        of_titles = {title: kls[world] for title, world in shown.items()}
        draw_curves({title: paths[world] for title, world in shown.items()}, of_titles, results / "quality-curves.svg")
        of_shown = {title: summaries[world] for title, world in shown.items()}
        draw_gaps(of_shown, of_titles, results / "quality-gaps.svg")
        draw_ranking(of_shown, of_titles, results / "quality-ranking.svg")
        if looks := {title: summary["close_look"] for title, summary in of_shown.items() if summary["close_look"]}:
            draw_steps(looks, results / "quality-steps.svg")
            draw_wins(looks, results / "quality-wins.svg")
    tables = ["# All rows of the quality benchmark", "", *_EXPLAINED]
    for world, summary in summaries.items():
        tables += ["", f"## {world}: {len(paths[world])} seed(s), {summary['num_policies']} policies", ""]
        tables += _table(summary, kls[world]) if len(paths[world]) > 1 else ["No settings can be chosen on others."]
    (results / "quality-tables.md").write_text("\n".join(tables) + "\n")
    print("\n".join(tables))


_EXPLAINED = """
Reward at equal KL against DPO's, and the share of the gap between DPO and oracle weights that is closed, with 95 % intervals
over seeds; settings are chosen on the other seeds. Of the scores: correlation with the true token rewards, standard deviation
on tokens whose true reward is 0, log-likelihood of labels that they have not seen (nats a pair), and the size of the gradient
that weights add at the start, relative to DPO's. A dash: the policy did not come to this KL.
[docs/quality.md](../../docs/quality.md) says what the rows are.
""".strip().splitlines()


def _table(summary: dict[str, Any], kls: tuple[float, ...]) -> list[str]:
    """Return a table in Markdown: reward minus DPO's and the gap closed at each KL, and what is known of the scores."""
    heads = [f"{what}, KL {kl:g}" for kl in kls for what in ("reward − DPO", "gap closed")]
    lines = [
        f"| | {' | '.join([*heads, 'token corr', 'neutral std', 'held-out LL', 'weight term'])} |",
        "|---" * (len(heads) + 5) + "|",
    ]
    for family, row in summary["rows"].items():
        cells = []
        for kl in kls:
            at_kl = row["at_kl"][f"{kl:g}"]
            gap = at_kl["gap_closed"]
            cells += [
                _pm(at_kl["minus_dpo"], at_kl["minus_dpo_half_width"], 2),
                _pm(gap["percent"], gap["half_width"], 0, " %"),
            ]
        of_scores = row["scores"]
        names = ("token_corr", "neutral_std", "log_likelihood", "weight_term_ratio")
        cells += [f"{of_scores[name]:.2f}" if name in of_scores else "" for name in names]
        if of_scores and of_scores["in_sample"]:
            cells[-2] = "in sample"
        lines.append(f"| {family} | {' | '.join(cells)} |")
    return lines


def _pm(value: float, half_width: float, digits: int, unit: str = "") -> str:
    return "–" if math.isnan(value) else f"{value:+.{digits}f} ± {half_width:.{digits}f}{unit}"


def main() -> None:
    """Run what is missing, and write the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--worlds", nargs="+", default=["planted", "toy"], choices=["planted", "toy", "tiny", "real"],
        help="tiny and real are real language: an hour more, and on a GPU",
    )  # fmt: skip
    parser.add_argument("--seeds", nargs="+", type=int, default=list(REPORTING_SEEDS))
    parser.add_argument("--cells", nargs="*", default=[], help="of the planted world only these, such as sparse-1000-0")
    parser.add_argument("--families", nargs="*", default=[], help="only these")
    parser.add_argument("--samples", type=int, default=2000, help="sampled responses in a measurement")
    parser.add_argument("--model", help="real language: the folder of a chat model")
    parser.add_argument("--shared", type=Path, default=REPO.parent / "shared", help="folder with data/ and models/")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--minutes", type=float, default=1e6, help="begin no policy after this long")
    parser.add_argument(
        "--close-look",
        action="store_true",
        help="not the runs, but what docs/quality.md plots of a few families; of the planted world sparse-1000-0",
    )
    parser.add_argument("--report", action="store_true", help="run nothing")
    parser.add_argument("--scratch", type=Path, default=SCRATCH, help="the folder of the runs")
    parser.add_argument("--results", type=Path, default=RESULTS, help="the folder of the result file and the figures")
    arguments = parser.parse_args()
    arguments.cells = arguments.cells or (["sparse-1000-0"] if arguments.close_look else [])
    if not arguments.report:
        if "real" in arguments.worlds and not arguments.model:
            parser.error("--worlds real needs --model, the folder of a chat model")
        if {"real", "tiny"} & {*arguments.worlds} and not (arguments.shared / "data").is_dir():
            parser.error(f"no folder {arguments.shared / 'data'}: give --shared, or leave out real language (--worlds)")
        run_missing(arguments)
    report(arguments.scratch, arguments.results)


def run_missing(arguments: argparse.Namespace) -> None:
    """Run what the folder of runs does not have."""
    from benchmarks.quality import close_look, runs
    from weights_store.processes.guard import guard, marked_environment

    # The processes of the pool end with this one, also if it is killed.
    os.environ |= {**marked_environment(guard().folder), "OMP_NUM_THREADS": "1"}
    until = time.monotonic() + 60 * arguments.minutes
    with ProcessPoolExecutor(arguments.processes, mp_context=get_context("spawn")) as pool:
        futures = []
        for name, make, families in jobs(arguments):
            path = arguments.scratch / f"{name}.jsonl"
            if arguments.close_look:
                futures.append(pool.submit(close_look.run_job, path, make))
            else:
                seconds = until - time.monotonic()
                futures.append(pool.submit(runs.run_job, path, make, families, arguments.families, seconds))
        for future in futures:
            print(f"{time.strftime('%H:%M:%S')} {future.result()}", flush=True)


if __name__ == "__main__":
    main()
