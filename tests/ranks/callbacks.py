"""Two ranks with a callback on the second alone: it stops the run, and in the resumed one it fails."""

import json
import os
import sys
from pathlib import Path

import klrl
from klrl.errors import RankLostError

RANK = int(os.environ["RANK"])
OPTIONS = {"n_envs": 2, "n_steps": 64, "eval_every": 0, "final_episodes": 2, "quiet": True, "total_timesteps": 5000}


class Stops(klrl.Callback):
    def on_update(self, run: klrl.LiveRun, result: klrl.UpdateResult) -> bool:
        return run.steps > 1000


class Fails(klrl.Callback):
    def on_update(self, run: klrl.LiveRun, result: klrl.UpdateResult) -> None:
        raise LookupError("mine")


run = klrl.train("ppo", "CartPole-v1", **OPTIONS, callbacks=[Stops()] if RANK else [])
why = ""
try:
    klrl.resume(run.folder, callbacks=[Fails()] if RANK else [])
except (LookupError, RankLostError) as problem:
    why = f"{type(problem).__name__}: {[problem, *getattr(problem, '__notes__', [])]}"
Path(f"{RANK}.json").write_text(json.dumps([run.steps, run.score.returns, why]))
if RANK == 0:
    Path(sys.argv[1]).write_text(json.dumps(str(run.folder)))
