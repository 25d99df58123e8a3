"""The short answer of the studies, for README and the page of the study; every number is computed from stored ranks.

    python tools/study_lines.py       # writes results/study/lines.md
"""
from pathlib import Path

from pli.core import atomic
from pli.evaluation.significance import SIGNIFICANT, verdict
from pli.studies.findings import Study, baselines_of, difference, recall_of, read_results
from pli.studies.tables import plain_recall_of, format_difference, format_ratio
from pli.studies.plan import read_plan

ROOT = Path(__file__).parent.parent
KINDS = ("colour", "pattern", "type", "wearer")
RATIOS = ("0.25", "0.5", "0.75", "0.9")


def stored(name: str) -> Study:
    "A study from its stored results, with the arms and figures of its plan."
    return read_results(ROOT / "results" / "study" / name, read_plan(ROOT / "studies" / f"{name}.toml"))


def at(study: Study, arm: str, kind: str = "colour", measure: str = "recall@10") -> str:
    "A level in percent."
    return f"{recall_of(study, arm, kind, measure)['mean'][0]:.1f}"


def above(study: Study, arm: str, kind: str = "colour", measure: str = "recall@10") -> str:
    "What an arm gives above the control, with its interval, and a word where that is not significant."
    found = difference(study, arm, kind=kind, measure=measure)
    return format_difference(found["difference"]) + ("" if found["significant"] else ", one seed" if found["seeds"] == 1 else ", not significant")


def verdict(*found: dict) -> str:
    "What several comparisons with the control say together, from their numbers."
    ways = {("above" if one["difference"][0] > 0 else "below") if one["significant"] else "neither" for one in found}
    if ways == {"neither"}: return "no significant difference from the control"
    if len(ways) == 1: return f"significantly {ways.pop()} the control" + (" every time" if len(found) > 1 else "")
    count = lambda way: sum(one["significant"] and (one["difference"][0] > 0) == way for one in found)
    return f"of {len(found)} comparisons with the control {count(True)} significantly above it, {count(False)} significantly below"


def judged(study: Study, arms: list[str], kinds: tuple[str, ...] = ("colour",)) -> str:
    return verdict(*(difference(study, arm, kind=kind) for arm in arms for kind in kinds))


def ratio(study: Study, arm: str, measure: str) -> str: return format_ratio(difference(study, arm, kind="colour", measure=measure)["ratio"])


def added(study: Study, arm: str) -> str:
    "What composing adds over the better half of the query."
    return format_difference(baselines_of(study, arm, "colour")["composing adds"])


def plain(study: Study, arm: str) -> str: return f"{plain_recall_of(study, arm, 'text to picture'):.1f}"   # of 100 captions, how many find their picture


def seeds(study: Study, arm: str) -> str: return f"{len(study.seeds(arm))} seed" + "s" * (len(study.seeds(arm)) > 1)


def lines(shop: Study, longer: Study, world: Study, emoji: Study, *captions: Study) -> list[str]:
    "What a reader should do, and why."
    both, asked, mixed, kept = "recolour + random 0.5", "colour requests", "mixture", "mixture, a third of the start"
    every = lambda study, arm: "; ".join(f"{kind} {above(study, arm, kind)}" for kind in KINDS)
    return [
        f"**Rule.** Take from the query picture what the words will change, keep of the caption what the picture lacks, and say it as a user would. On `colour` queries the control finds {at(longer, 'control')} at 10 and {at(longer, 'control', measure='recall@1')} at 1, `{asked}` {at(longer, asked)} and "
        f"{at(longer, asked, measure='recall@1')}: {ratio(longer, asked, 'recall@10')} and {ratio(longer, asked, 'recall@1')} times ({seeds(longer, asked)}).",
        f"**Only colour words**, `{asked}`: `--hide \"recolour+random:0.5+only:colour+ask\"`. Colours falsified in 7 of 10 pictures, half of the patches hidden, of the caption only its colour words, said as a request (\"in red\", \"red instead of blue\"). Above the control at 10: {every(longer, asked)} ({seeds(longer, asked)}).",
        f"**All kinds of words**, `{mixed}`: `--hide \"recolour+random:0.5+only:colour+ask|recolour+random:0.5+drop:0.6\" --clip-weight 0.5`: half requests, half captions with most words dropped, and the CLIP loss beside it. Above the control at 10: {every(longer, mixed)} ({seeds(longer, mixed)}).",
        f"**And keep more of what the start could do**: average its weights with the start's, `pli average START TUNED --shares 0.34 0.66 --out BOTH`. Above the control at 10: {every(longer, kept)}; on `colour` {ratio(longer, kept, 'recall@10')} times at 10 and {ratio(longer, kept, 'recall@1')} at 1 ({seeds(longer, kept)}). Plain search by words: captions of held-out pairs find their picture among the first ten in {plain(longer, 'control')} of 100 cases (control), {plain(longer, asked)} (`{asked}`), {plain(longer, mixed)} (`{mixed}`), {plain(longer, kept)} (averaged).",
        f"**Words, and what the picture still shows.** Recall@10 on `colour` after 120 steps: control {at(shop, 'control')}; recolouring and masking with whole captions {at(shop, both)}, half the words {at(shop, both + ', half the words')}, colour words {at(shop, both + ', colour words')}"
        + f", colour requests {at(shop, both + ', colour requests')}; the same requests without recolouring {at(shop, 'random 0.5, colour requests')}. In a drawn world, where properties can be switched, requests about shape give `shape` {above(world, 'shape requests', 'shape')} where the picture shows the shape, and {above(world, 'shape requests, random 0.75', 'shape')} where it hides it.",
        f"**Random masking alone, colour queries on photographs** (a quarter of a shirt still shows its colour), by ratio: {judged(shop, [f'random {share}' for share in RATIOS])}. " + "; ".join(f"{share}: {above(shop, f'random {share}')}" for share in RATIOS)
        + f". In the drawn world, whose captions say shape and colour and nothing else: {judged(world, ['random 0.75'], ('colour', 'shape'))}; 0.75 gives `colour` {above(world, 'random 0.75')}, `shape` {above(world, 'random 0.75', 'shape')}; where captions name any property 30, 70 or 100 times in 100, it gives {', '.join(above(study, 'random 0.75', 'all') for study in captions)} on all queries.",
        "**Words for the wearer and the kind of thing**: drop words, and crop. " + f"`random:0.75+drop:0.5` gives wearer {above(shop, 'random 0.75, half the words', 'wearer')} and type {above(shop, 'random 0.75, half the words', 'type')}, `crop:0.4` wearer {above(shop, 'crop 0.4', 'wearer')} and type {above(shop, 'crop 0.4', 'type')}; on colour they give {above(shop, 'random 0.75, half the words')} and {above(shop, 'crop 0.4')}. "
        + f"The fair comparison, without hiding or composing: half the words in the plain CLIP loss give wearer {above(shop, 'half the words in the CLIP loss', 'wearer')} and type {above(shop, 'half the words in the CLIP loss', 'type')}, colour {above(shop, 'half the words in the CLIP loss')}.",
        f"**Look at the halves.** Recall@10 of the picture half alone on `colour`: {baselines_of(longer, 'control', 'colour')['image only']:.1f} (control), {baselines_of(longer, 'recolour + random 0.5, few words', 'colour')['image only']:.1f} (few words), "
        f"{baselines_of(longer, asked, 'colour')['image only']:.1f} (`{asked}`). What composing adds to the better half: {added(longer, 'control')}, {added(longer, 'recolour + random 0.5, few words')}, {added(longer, asked)}; `{mixed}` {added(longer, mixed)}.",
        f"**What does not need the words is not composing.** Recall@10 on `colour`: without any colour word in the captions the same corruption reaches {at(shop, both + ', no colour words')}, with no words at all {at(shop, both + ', no words')}, with whole captions {at(shop, both)}; control {at(shop, 'control')}.",
        f"**Elsewhere, and not settled.** The mixture on emoji drawings: {'; '.join(f'{kind} {above(emoji, mixed, kind)}' for kind in ('tone', 'gender', 'role'))} (`tone` stands at {at(emoji, 'control', 'tone')} without it). One small start model, one set of photographs; arms were chosen on these queries" + (f"; {len(shop.missing)} of the runs with 120 steps are still to come." if shop.missing else "."),
    ]


def main() -> None:
    text = "\n".join(f"{number}. {line}" for number, line in enumerate(lines(*map(stored, ("shop", "shop-longer", "world", "emoji", *(f"world-captions-{share}" for share in (30, 70, 100))))), 1)) + "\n"
    with atomic(ROOT / "results" / "study" / "lines.md") as temporary: temporary.write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__": main()
