"""Recovery: certain, fast, robust, linear: ``make bench-recovery`` (about half an hour).

The first run embeds a million images (an hour or two more) and keeps their features in
``results/bench-recovery``, chunk by chunk, so that it may be interrupted; with
``python benchmarks/recovery.py CASE ...`` only some cases are measured again.

Seeds are from 90,310 on: nothing was trained or tuned on them. Seconds are wall time;
``cpu_seconds`` stand beside them because the machine may be busy. Each case runs in a process of
its own, whose peak memory is the record's.
"""

import argparse
import json
import multiprocessing
import resource
import time
import warnings
from pathlib import Path

import numpy as np
import records

from cryoem import (
    distances,
    evaluation,
    imaging,
    recovery,
    rotations,
    structures,
)
from cryoem.io import files
from cryoem.recovery import frame

PARTICLE, SEED, N = "4jsv", 90_310, 1650
#: Features are kept by the weights that made them.
FOLDER = (
    Path(__file__).parent.parent
    / "results"
    / "bench-recovery"
    / files.sha256(structures.DATA / f"{PARTICLE}.npz")[:12]
)
PAPER_RAD = {
    0.1: 0.069, 0.2: 0.099, 0.3: 0.123, 0.4: 0.128, 0.5: 0.157, 0.6: 0.162, 0.7: 0.184, 0.8: 0.194,
}  # fmt: skip
SNRS = {
    "inf": np.inf, "1/4": 0.25, "1/16": 1 / 16, "1/32": 1 / 32, 
    "1/64": 1 / 64, "1/128": 1 / 128,
}  # fmt: skip
CHUNK, BATCH = 10_000, 2_000
DESCENT_SECONDS = 15 * 60


def timed(function, *args, **options):
    wall, cpu = time.perf_counter(), time.process_time()
    result = function(*args, **options)
    return result, {
        "seconds": time.perf_counter() - wall,
        "cpu_seconds": time.process_time() - cpu,
    }


def e_or(found, true):
    return evaluation.orientation_errors(found, true, over="o4").mean_rad


def summary(case, runs, limit_rad, **more):
    """One record of several seeds: successes below a limit, worst and mean."""
    errors = [r["e_or_rad"] for r in runs]
    return {
        "case": case,
        "n": N,
        "seeds": len(runs),
        "successes": sum(e < limit_rad for e in errors),
        "limit_rad": limit_rad,
        "e_or_rad": float(np.mean(errors)),
        "worst_e_or_rad": max(errors),
        "seconds": float(np.median([r["seconds"] for r in runs])),
        "slowest_seconds": max(r["seconds"] for r in runs),
        "cpu_seconds": float(np.median([r["cpu_seconds"] for r in runs])),
        "slowest_cpu_seconds": max(r["cpu_seconds"] for r in runs),
        **more,
    }


def runs(seeds, make):
    """Recover from what ``make(rng, q)`` gives, (pairs, distances), for each seed."""
    out = []
    for seed in range(seeds):
        rng = np.random.default_rng([SEED, seed])
        q = rotations.uniform(N, rng)
        found, used = timed(recovery.recover, *make(rng, q), N, seed=seed)
        out.append({"e_or_rad": e_or(found.quaternions, q), **used})
    return out


# --------------------------------------------------------------------------------------
# Distances that are given


def exact():
    pairs = distances.all_pairs(N)
    made = runs(100, lambda rng, q: (pairs, rotations.pair_distances(q, pairs)))
    yield summary("exact", made, 1e-3)


def perturbed():
    pairs = distances.all_pairs(N)
    for variance, paper in PAPER_RAD.items():
        sd, floor = np.sqrt(variance), recovery.error_floor(N, np.sqrt(variance))

        def make(rng, q, sd=sd):
            noise = sd * rng.standard_normal(len(pairs))
            return pairs, np.clip(rotations.pair_distances(q, pairs) + noise, 0, np.pi)

        yield summary(
            "perturbed",
            runs(3, make),
            1.15 * floor,
            variance_rad2=variance,
            floor_rad=floor,
            paper_rad=paper,
        )


def wild():
    pairs = distances.all_pairs(N)

    def make(rng, q):
        d = rotations.pair_distances(q, pairs)
        return pairs, np.where(rng.random(len(d)) < 0.2, rng.uniform(0, np.pi, len(d)), d)

    yield summary("wild", runs(5, make), 2e-3, wild_fraction=0.2)


def few():
    pairs = distances.all_pairs(N)
    for share in (0.05, 0.03):

        def at_random(rng, q, share=share):
            some = pairs[rng.random(len(pairs)) < share]
            return some, rotations.pair_distances(q, some)

        yield summary("few at random", runs(5, at_random), 1e-3, share_of_pairs=share)
    for each in (8, 6):

        def chosen(rng, q, each=each):
            some = recovery.choose_pairs(N, rng, each=each)
            return some, rotations.pair_distances(q, some)

        share = len(recovery.choose_pairs(N, 0, each=each)) / len(pairs)
        yield summary("few chosen", runs(20, chosen), 1e-3, share_of_pairs=share)


# --------------------------------------------------------------------------------------
# Learned distances


def features_at(snr, seed, n=1000, copies=200):
    """Features of ``n`` images and of turned and mirrored copies; kept for the next run."""
    path = FOLDER / f"snr_{snr.replace('/', '_')}_{seed}_{n}.npz"
    if not path.exists():
        from cryoem import load_density, load_estimator, simulate

        density, model = load_density(PARTICLE), load_estimator(PARTICLE)
        seen = simulate(density, n, seed, snr=SNRS[snr])
        more = {}
        if snr == "1/16":
            alien = load_density("1i10")
            alien = simulate(alien, n // 9, seed + 1, snr=SNRS[snr])
            rng = rotations.generator(seed, "pure noise")
            noise = rng.standard_normal(alien.images.shape, dtype=np.float32)
            more = {"alien": model.embed(alien.images), "noise": model.embed(noise)}
        with files.atomic(path) as temporary:
            np.savez(
                temporary,
                features=model.embed(seen.images),
                turned=model.embed(imaging.quarter_turn(seen.images[:copies])),
                mirrored=model.embed(imaging.mirror(seen.images[:copies])),
                quaternions=seen.quaternions,
                **more,
            )
    with np.load(path) as archive:
        return dict(archive)


def learned():
    """All pairs against features; 20 % of the pairs wild; the frame, over SNR."""
    for snr in SNRS:
        made = []
        for seed in range(SEED, SEED + 1):  # one: each is a thousand images
            data = features_at(snr, seed)
            f, true = data["features"], data["quaternions"]
            pairs = distances.all_pairs(len(f))
            d = distances.from_features(f, f)[tuple(pairs.T)]
            every = recovery.recover(pairs, d, seed=seed)
            rng = np.random.default_rng(seed)
            spoilt = np.where(rng.random(len(d)) < 0.2, rng.uniform(0, np.pi, len(d)), d)
            spoilt = recovery.recover(pairs, spoilt, seed=seed)
            c = len(data["turned"])
            together = np.concatenate([f, data["turned"], data["mirrored"]])
            found, used = timed(recovery.recover_features, together, seed=seed)
            q, n = found.quaternions, len(f)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                fixed = frame.from_copies(q[:200], q[n : n + 200], q[n + c : n + c + 200])
            made.append(
                {
                    "e_or_rad": e_or(q[:n], true),
                    "one_sided_error_rad": evaluation.orientation_errors(
                        fixed.apply(q[:n]), true
                    ).mean_rad,
                    "all_pairs_e_or_rad": e_or(every.quaternions, true),
                    "wild_e_or_rad": e_or(spoilt.quaternions, true),
                    "frame_certain": float(fixed.certain),
                    "frame_confidence": fixed.confidence,
                    "frame_spread_rad": fixed.spread_rad,
                    "frame_other_spread_rad": fixed.other_spread_rad,
                    **used,
                }
            )
        mean = {key: float(np.mean([m[key] for m in made])) for key in made[0]}
        yield {
            "case": "learned",
            "n": 1000,
            "seeds": len(made),
            "snr": snr,
            "successes": sum(m["one_sided_error_rad"] < 1.1 * m["e_or_rad"] for m in made),
            **mean,
        }


def outcome():
    """What residuals say of each particle: order within the good, and contaminants."""
    from scipy.stats import rankdata, spearmanr

    data = features_at("1/16", SEED)
    true = data["quaternions"]
    found = recovery.recover_features(data["features"], seed=SEED)
    off = rotations.distance(evaluation.align(found.quaternions, true).quaternions, true)
    yield {
        "case": "outcome",
        "n": len(true),
        "seeds": 1,
        "snr": "1/16",
        "e_or_rad": float(off.mean()),
        "spearman_expected_with_true_error": float(
            spearmanr(found.expected_error_rad, off).statistic
        ),
        "flagged_fraction": float(found.outlier.mean()),
        "mean_error_of_flagged_rad": float(off[found.outlier].mean()),
    }
    for kind in ("noise", "alien"):
        bad = data[kind][: len(true) // 9]
        together = np.concatenate([data["features"][: 9 * len(bad)], bad])
        is_bad = np.arange(len(together)) >= 9 * len(bad)
        found = recovery.recover_features(together, seed=SEED)
        ranks = rankdata(found.residuals_rad)
        a, b = is_bad.sum(), (~is_bad).sum()
        yield {
            "case": "contaminants",
            "kind": {"noise": "pure noise", "alien": "1I10 at SNR 1/16"}[kind],
            "n": len(together),
            "seeds": 1,
            "snr": "1/16",
            "contaminants": int(a),
            "auroc_of_residual": float((ranks[is_bad].sum() - a * (a + 1) / 2) / (a * b)),
            "flagged_of_contaminants": float(found.outlier[is_bad].mean()),
            "flagged_of_the_others": float(found.outlier[~is_bad].mean()),
            "e_or_rad": e_or(found.quaternions[~is_bad], true[: 9 * len(bad)]),
        }


# --------------------------------------------------------------------------------------
# A million


def embed(n):
    """Features of ``n`` simulated images at SNR 1/16, made in chunks that are kept.

    The images are projected at the network's own sampling, from a seed it was not trained on.
    """
    wanted = [FOLDER / f"chunk_{c:03d}.npz" for c in range(n // CHUNK)]
    missing = [c for c, path in enumerate(wanted) if not path.exists()]
    if missing:
        from cryoem import TrainingImages, load_density, load_estimator

        model = load_estimator(PARTICLE, precision="mixed_bfloat16")
        density = load_density(PARTICLE)
        source = TrainingImages(
            density, model.preprocessing, snr_range=(1 / 16, 1 / 16), clean_fraction=0.0
        )
        for c in missing:
            start, f, q, copies = time.perf_counter(), [], [], {}
            for b in range(CHUNK // BATCH):
                images, true = source.batch(SEED, c * (CHUNK // BATCH) + b, BATCH)
                f.append(model.embed(images, prepared=True))
                q.append(source.group.decode(true[:, : len(source.group.harmonics)]))
                if c == b == 0:
                    for name, change in (
                        ("turned", imaging.quarter_turn),
                        ("mirrored", imaging.mirror),
                    ):
                        copies[name] = model.embed(change(images[:500]), prepared=True)
            with files.atomic(wanted[c]) as temporary:
                np.savez(
                    temporary,
                    features=np.concatenate(f),
                    quaternions=np.concatenate(q),
                    seconds=time.perf_counter() - start,
                    **copies,
                )
            print(f"embedded {len(list(FOLDER.glob('chunk_*.npz')))} of {len(wanted)}", flush=True)
    return wanted


def many(most):
    """Linear cost; the largest set is what has been embedded, and its number is stated."""
    paths = embed(most)
    for n in sorted({min(n, most) for n in (10_000, 30_000, 100_000, 300_000, 1_000_000)}):
        yield from apart(_many, [str(p) for p in paths[: n // CHUNK]], n)


def _many(paths, n):
    chunks = [np.load(path) for path in paths]
    f = np.concatenate([chunk["features"] for chunk in chunks])
    true = np.concatenate([chunk["quaternions"] for chunk in chunks]).astype(np.float64)
    true /= np.linalg.norm(true, axis=1, keepdims=True)
    turned, mirrored = chunks[0]["turned"], chunks[0]["mirrored"]
    found, used = timed(recovery.recover_features, f, seed=SEED)
    marks = recovery.find_landmarks(f, seed=SEED)
    fixed = frame.from_copies(
        found.quaternions[: len(turned)],
        marks.place(turned).quaternions,
        marks.place(mirrored).quaternions,
    )
    some = np.random.default_rng(SEED).choice(n, 10_000, replace=False)
    q = found.quaternions[some]
    yield {
        "case": "many",
        "n": n,
        "seeds": 1,
        "snr": "1/16",
        "successes": int(used["seconds"] < 60),
        "embedding_seconds": float(sum(chunk["seconds"] for chunk in chunks)),
        "e_or_rad": e_or(q, true[some]),
        "one_sided_error_rad": evaluation.orientation_errors(fixed.apply(q), true[some]).mean_rad,
        "frame_certain": float(fixed.certain),
        **used,
    }


# --------------------------------------------------------------------------------------
# The paper's algorithm


def paper_descent(pairs, d, start, seconds, *, batch_pairs=256, learning_rate=0.5, seed=0):
    """The published program's loop: one variable a particle, 256 pairs a step; (q, steps)."""
    import keras
    import tensorflow as tf

    from cryoem.recovery import descent

    variables = [tf.Variable(q[None], dtype=tf.float32) for q in start]
    optimizer = keras.optimizers.Adam(learning_rate)
    optimizer.build(variables)
    rng, steps, begin = np.random.default_rng(seed), 0, time.perf_counter()
    while time.perf_counter() - begin < seconds:
        draw = rng.integers(len(pairs), size=batch_pairs)
        both = [[variables[k] for k in pairs[draw, side]] for side in (0, 1)]
        with tf.GradientTape() as tape:
            q, p = (tf.math.l2_normalize(tf.concat(side, 0), axis=-1) for side in both)
            target = tf.constant(d[draw], tf.float32)
            loss = tf.reduce_mean((target - descent.geodesic(q, p)) ** 2)
        # A particle that was drawn twice has one gradient, the sum.
        moved = list({id(v): v for v in both[0] + both[1]}.values())
        optimizer.apply(tape.gradient(loss, moved), moved)
        steps += 1
    q = np.concatenate([v.numpy() for v in variables]).astype(np.float64)
    return q / np.linalg.norm(q, axis=1, keepdims=True), steps


def against_the_paper():
    """Side by side: the paper's loop, the same descent vectorised, and ours, on exact distances."""
    from cryoem.recovery import descent

    rng = np.random.default_rng([SEED, 1])
    true, pairs = rotations.uniform(N, rng), distances.all_pairs(N)
    d = rotations.pair_distances(true, pairs)
    start = rotations.uniform(N, rng)
    (q, steps), used = timed(paper_descent, pairs, d, start, DESCENT_SECONDS)
    reached = recovery.pair_loss(q, pairs, d)
    common = {"case": "against the paper", "n": N, "seeds": 1, "loss_to_reach_rad2": reached}
    yield {
        **common,
        "algorithm": "the paper's, one variable a particle",
        "steps": steps,
        "loss_rad2": reached,
        "e_or_rad": e_or(q, true),
        "ratio_to_paper_algorithm": 1.0,
        **used,
    }
    descent.descend(pairs, d, init=start, steps=10)  # compiles outside of what is timed
    for count in (1, 2, 4, 8, 16, 32, 64):
        found, vectorised = timed(descent.descend, pairs, d, init=start, steps=500 * count)
        loss = recovery.pair_loss(found.quaternions, pairs, d)
        if loss <= reached:
            break
    yield {
        **common,
        "algorithm": "the same descent, vectorised",
        "steps": 500 * count,
        "loss_rad2": loss,
        "e_or_rad": e_or(found.quaternions, true),
        "ratio_to_paper_algorithm": used["seconds"] / vectorised["seconds"],
        **vectorised,
    }
    ours = [timed(recovery.recover, pairs, d, N, seed=seed) for seed in range(3)]
    found, best = min(ours, key=lambda one: one[1]["seconds"])
    yield {
        **common,
        "algorithm": "landmarks and lateration, to the end",
        "loss_rad2": found.loss,
        "e_or_rad": e_or(found.quaternions, true),
        "successes": int(found.loss <= reached and used["seconds"] >= 1000 * best["seconds"]),
        "ratio_to_paper_algorithm": used["seconds"] / best["seconds"],
        **best,
    }


# --------------------------------------------------------------------------------------
# The table


CASES = {
    "exact": exact,
    "perturbed": perturbed,
    "wild": wild,
    "few": few,
    "learned": learned,
    "outcome": outcome,
    "paper": against_the_paper,
}


def _collect(function, args, queue):
    found = [*function(*args)]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
    queue.put([{"peak_memory_gb": peak, **record} for record in found])


def apart(function, *args):
    """Records of a case that runs in a fresh process, with that process's peak memory."""
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    process = context.Process(target=_collect, args=(function, args, queue))
    process.start()
    while process.is_alive() and queue.empty():
        time.sleep(0.2)
    if queue.empty():
        raise SystemExit(f"{function.__name__} ended with code {process.exitcode}")
    yield from queue.get()
    process.join()


def table(found):
    def of(case):
        return [r for r in found if r["case"] == case]

    rows = []
    for r in of("exact"):
        rows.append(
            [
                "exact distances, 1,650 orientations, all pairs",
                f"{r['successes']} of {r['seeds']} seeds below 1e-3 rad, worst "
                f"{r['worst_e_or_rad']:.0e}; {r['seconds']:.1f} s, slowest "
                f"{r['slowest_seconds']:.1f} s (CPU {r['cpu_seconds']:.1f} s)",
            ]
        )
    for r in of("perturbed"):
        rows.append(
            [
                f"noise of variance {r['variance_rad2']} (paper {r['paper_rad']} rad)",
                f"{r['e_or_rad']:.4f} rad, {r['e_or_rad'] / r['floor_rad']:.2f} x the floor "
                f"{r['floor_rad']:.4f}; {r['successes']} of {r['seeds']} within 1.15 x",
            ]
        )
    for r in of("wild"):
        rows.append(
            [
                "20 % of the distances replaced by uniform noise, the rest exact",
                f"{r['e_or_rad']:.1e} rad, worst {r['worst_e_or_rad']:.1e}; {r['successes']} of "
                f"{r['seeds']} below 2e-3; CPU {r['cpu_seconds']:.1f} s",
            ]
        )
    for r in of("few at random") + of("few chosen"):
        rows.append(
            [
                f"{100 * r['share_of_pairs']:.2f} % of the pairs, {r['case'][4:]}, exact",
                f"{r['successes']} of {r['seeds']} below 1e-3 rad; CPU {r['cpu_seconds']:.1f} s",
            ]
        )
    for r in of("learned"):
        rows.append(
            [
                f"learned distances, SNR {r['snr']}, 1,000 images",
                f"E_OR {r['e_or_rad']:.4f} rad from 256 landmarks ({r['all_pairs_e_or_rad']:.4f} "
                f"all pairs, {r['wild_e_or_rad']:.4f} with 20 % of them wild); frame from copies: "
                f"one-sided {r['one_sided_error_rad']:.4f}, certain in {r['frame_certain']:.0%}",
            ]
        )
    for r in of("outcome"):
        rows.append(
            [
                "expected error against the true, SNR 1/16",
                f"Spearman {r['spearman_expected_with_true_error']:.2f}",
            ]
        )
    for r in of("contaminants"):
        rows.append(
            [
                f"10 % contaminants: {r['kind']}",
                f"AUROC {r['auroc_of_residual']:.3f}; flagged {r['flagged_of_contaminants']:.0%} "
                f"of them, {r['flagged_of_the_others']:.1%} of the others",
            ]
        )
    for r in of("many"):
        rows.append(
            [
                f"{r['n']:,} particles from learned features, SNR 1/16",
                f"{r['seconds']:.1f} s (CPU {r['cpu_seconds']:.1f} s), {r['peak_memory_gb']:.1f} "
                f"GB; E_OR {r['e_or_rad']:.3f}, one-sided {r['one_sided_error_rad']:.3f} rad; "
                f"embedding {r['embedding_seconds']:.0f} s",
            ]
        )
    for r in of("against the paper"):
        rows.append(
            [
                f"exact distances, {r['algorithm']}",
                f"loss {r['loss_rad2']:.1e} rad^2 (E_OR {r['e_or_rad']:.1e}) after "
                f"{r['seconds']:.1f} s: {r['ratio_to_paper_algorithm']:,.0f} x faster",
            ]
        )
    return rows


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    every = [*CASES, "many"]
    parser.add_argument("cases", nargs="*", help=f"of {', '.join(every)}; default: all")
    parser.add_argument("--most", type=int, default=1_000_000, help="particles of 'many', at most")
    options = parser.parse_args()
    if unknown := set(options.cases) - set(every):  # choices would refuse none, on Python 3.11
        parser.error(f"no case {', '.join(unknown)}")
    cases = options.cases or every
    path, order = records.RESULTS / "recovery.json", every
    for case in cases:
        made = many(options.most) if case == "many" else apart(CASES[case])
        new = []
        for record in made:
            print(record, flush=True)
            new.append({"of": case, **record})
        # What other cases left stays as it was.
        kept = json.loads(path.read_text()) if path.exists() else []
        kept = [r for r in kept if r["of"] != case] + new
        kept.sort(key=lambda r: order.index(r["of"]))
        records.write("recovery", kept, ["what", "here"], table(kept), "make bench-recovery")


if __name__ == "__main__":
    main()
