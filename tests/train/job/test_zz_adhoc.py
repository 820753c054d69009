"""One-off: two gloo processes against one, loss kto on unpaired rows."""

import sys

sys.path.insert(0, "/work/wt/kto")
from tests.train.job.test_parallel import *
from tests.train.job.test_unpaired import unpaired_rows, write_unpaired


def test_two(settings, make_config, write_unpaired, unpaired_rows, tmp_path):
    write_unpaired([*unpaired_rows, {**unpaired_rows[5], "pair_id": "pair-0040"}])
    settings["optim"]["tokens_per_batch"] = 40
    settings["loss"] = {"name": "kto", "beta": 0.1}
    settings["data"]["weights"] = "toy/tis"
    settings["gate"] = {"pairs": 0}
    one = run_job(make_config(gate={"pairs": 0}))
    for launcher, more, name in ((ACCELERATE, {}, "two"), (TORCHRUN, {"parallel": {"strategy": "fsdp2"}}, "fsdp")):
        done = (
            launch(launcher, "-m", "tokenweights", "train", write_config(settings, tmp_path / name, **more))
            if launcher is ACCELERATE
            else launch(launcher, "-m", "tokenweights", "train", write_config(settings, tmp_path / name, **more))
        )
        assert done.returncode == 0, done.stderr[-3000:]
        print(history_of(tmp_path / name)[:12], history_of(one.folder)[:12])
        assert history_of(tmp_path / name) == pytest.approx(
            history_of(one.folder), rel=1e-5 if name == "two" else 1e-3, abs=1e-5 if name == "two" else 1e-3
        )
