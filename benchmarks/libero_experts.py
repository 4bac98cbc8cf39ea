"""How often LIBERO's scripted expert succeeds: its share of successes over that of an expert that never fails.

    python benchmarks/libero_experts.py [--tasks 0 1 2] [--episodes 50] [--elsewhere 1000] [--disturb 0.1]

Begins in the benchmark's own initial states, or with --elsewhere in others, by which the expert may be chosen. Nothing
is drawn, and the scene is not loaded anew for each episode: the object tasks have no cabinets, and the same numbers of
steps came out in three episodes held against it. Beside each share stands its 95 % Wilson interval.
"""

from __future__ import annotations

import argparse
from collections import Counter

import numpy as np

from vlaft.environments.episodes import wilson_interval
from vlaft.environments.libero.demonstrations import Sight, disturb
from vlaft.environments.libero.environment import LiberoEnv, as_libero
from vlaft.environments.libero.expert import Picker
from vlaft.environments.libero.tasks import INITIAL_STATES, STEP_LIMITS, SUITES

SUITE = "libero_object"


def steps_until_done(env: LiberoEnv, generator: np.random.Generator, share: float) -> int | None:
    """Let the expert act in the episode that has begun; return after how many steps it has succeeded, if it has."""
    sight, expert = Sight(env.world), Picker()
    for number in range(STEP_LIMITS[SUITE]):
        action = disturb(expert.action(sight.scene()), generator, share)
        if env.act(as_libero(action.astype(np.float64)))[1]:
            return number + 1
    return None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", type=int, nargs="*", default=list(range(len(SUITES[SUITE]))))
    parser.add_argument("--episodes", type=int, default=INITIAL_STATES, help="of each task")
    parser.add_argument("--elsewhere", type=int, help="first seed; without it, initial states from the first on")
    parser.add_argument("--disturb", type=float, default=0.0, help="share of the steps")
    options = parser.parse_args()
    for task in options.tasks:
        env, done = LiberoEnv(SUITE, task), Counter[str]()
        env.scatter(0)
        world = env.world.env
        world.hard_reset = False
        for name in ("agentview_image", "robot0_eye_in_hand_image"):
            world._observables[name].set_enabled(False)
        steps, failed = [], []
        for number in range(options.episodes):
            if options.elsewhere is None:
                env.restore(env.initial_states[number], 0)
            else:
                env.scatter(options.elsewhere + number)
            taken = steps_until_done(env, np.random.default_rng([number, 1]), options.disturb)
            done["succeeded" if taken else "failed"] += 1
            steps += [taken] if taken else []
            failed += [] if taken else [number + (options.elsewhere or 0)]
        low, high = wilson_interval(done["succeeded"], options.episodes)
        print(
            f"{SUITE}:{task} {done['succeeded']} of {options.episodes} ({low:.0%} to {high:.0%}),"
            f" median {np.median(steps) if steps else 0:.0f} steps, most {max(steps, default=0)}; failed: {failed}",
            flush=True,
        )
        env.close()


if __name__ == "__main__":
    main()
