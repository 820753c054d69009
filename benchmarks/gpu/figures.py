"""From what the parts have measured to the figures that have a target, and the table; also of a partial run."""

from collections.abc import Callable
from typing import Any

Results = dict[str, Any]
TARGETS: dict[str, tuple[str, float]] = {
    "step / TRL with reference": ("at most", 0.20),
    "step / TRL precomputed": ("at most", 0.25),
    "MFU of our step": ("at least", 0.40),
    "peak memory / TRL": ("at most", 0.4),
    "score / prefill, HH": ("at least", 1.2),
    "score / prefill, Alpaca": ("at least", 1.3),
    "score / prefill, long": ("at least", 1.6),
    "attribution / forward": ("at most", 2.2),
    "checks that failed": ("at most", 0),
}


def compute_figures(results: Results) -> dict[str, float]:
    """Return the figures that the results suffice for."""
    parts: dict[str, Any] = {name: part.get("results", {}) for name, part in results["parts"].items()}
    train, score = parts.get("train", {}), parts.get("score", {})
    attribute, generate = parts.get("attribute", {}), parts.get("generate", {})
    ways = (score.get("parity"), score.get("full steps"), parts.get("ways", {}).get("parity"))
    checks = [*parts.get("checks", {}).values(), *(way for way in ways if way)]
    found: dict[str, Callable[[], float]] = {
        "step / TRL with reference": lambda: train["ours"]["median_step_s"] / train["trl"]["median_step_s"],
        "step / TRL precomputed": lambda: train["ours"]["median_step_s"] / train["trl_precomputed"]["median_step_s"],
        "MFU of our step": lambda: train["ours"]["model_flops_utilisation"],
        "peak memory / TRL": lambda: train["ours"]["peak_mb"] / train["trl"]["peak_mb"],
        **{
            f"score / prefill, {label}": lambda name=name: score[name]["prefill"]["s"] / score[name]["ours"]["s"]
            for name, label in {"hh": "HH", "alpaca": "Alpaca", "long": "long"}.items()
        },
        **{
            f"score / plain vLLM, {label}": lambda name=name: (
                score[f"{name}, plain"]["plain"]["s"] / score[name]["ours"]["s"]
            )
            for name, label in {"hh": "HH", "alpaca": "Alpaca", "long": "long"}.items()
        },
        "attribution / forward": lambda: attribute["ours"]["s"] / attribute["forward"]["s"],
        "naive attribution / ours": lambda: attribute["naive"]["s_for_all_pairs"] / attribute["ours"]["s"],
        "sampling, graphs / eager": lambda: generate["sampling"]["tokens_per_s"] / score["sampling"]["tokens_per_s"],
    }
    figures = {}
    for name, compute in found.items():
        try:
            figures[name] = compute()
        except (KeyError, ZeroDivisionError):
            continue  # not measured, or not yet
    if checks:
        figures["checks that failed"] = float(sum(not check.get("passed", False) for check in checks))
        figures["checks that passed"] = len(checks) - figures["checks that failed"]
    return figures


def print_table(results: Results) -> None:
    """Print state of the parts, figures with targets, and what was measured of training, scoring and kernels."""
    machine = results.get("machine") or {}
    print(
        f"\n{machine.get('gpu', 'no GPU')}; {machine.get('packages', {})}"
        + (" (quick)" if results.get("quick") else "")
    )
    for name, part in results["parts"].items():
        found = part.get("results", {})
        errors = [f"{key}: {' '.join(of['error'].split())[:160]}" for key, of in found.items() if has_error(of)]
        print(f"  {name:<12}{part['status']:<12}{part.get('took_s', 0):>6.0f} s   {part.get('reason', '')[:120]}")
        for error in errors:
            print(f"    {error}")
    figures = compute_figures(results)
    print(f"\n{'figure':<34}{'reached':>10}   target")
    for name in dict.fromkeys((*TARGETS, *figures)):
        bound, target = TARGETS.get(name, ("", 0.0))
        reached = figures.get(name)
        missed = reached is not None and bound and (reached > target if bound == "at most" else reached < target)
        cell = f"{'-':>10}" if reached is None else f"{reached:>10.3g}"
        print(f"{name:<34}{cell}   {f'{bound} {target:g}' if bound else ''}{'   MISSED' if missed else ''}")
    _print_parts({name: part.get("results", {}) for name, part in results["parts"].items()})


def has_error(of: Any) -> bool:
    """Whether a measurement failed."""
    return isinstance(of, dict) and "error" in of


def _print_parts(parts: Results) -> None:
    steps = {name: of for name, of in parts.get("train", {}).items() if isinstance(of, dict) and "median_step_s" in of}
    if steps:
        print(f"\n{'training':<34}{'s a step':>10}{'peak MB':>10}{'tokens/s':>10}{'MFU':>8}")
    for name, of in steps.items():
        cells = f"{of['median_step_s']:>10.3f}{of['peak_mb']:>10,.0f}{of['tokens_per_s']:>10,.0f}"
        print(f"{name:<34}{cells}{of['model_flops_utilisation']:>8.1%}")
    for name, of in parts.get("train", {}).items():
        if name.startswith("long row") and "s" in of:
            print(f"{name}: {of['num_tokens']:,} tokens, {of['s'][-1]:.2f} s, {of['with_adamw_mb']:,.0f} MB with AdamW")
    rates = [
        (f"{name}, {way}" if way != "plain" else name, of[way])
        for name, of in parts.get("score", {}).items()
        for way in ("prefill", "ours", "plain")
        if isinstance(of, dict) and way in of
    ]
    if rates:
        print(f"\n{'scoring':<34}{'s':>10}{'response tokens/s':>20}{'engine tokens/s':>18}")
    for name, of in rates:
        print(f"{name:<34}{of['s']:>10.2f}{of['response_tokens_per_s']:>20,.0f}{of['engine_tokens_per_s']:>18,.0f}")
    classes = parts.get("profile", {}).get("classes", {})
    if classes:
        print(f"\n{'our step, by class of kernel':<34}{'ms':>10}{'kernels':>10}")
    for name, of in classes.items():
        print(f"{name:<34}{of['ms']:>10.1f}{of['kernels']:>10.0f}")
