"""The code path of eight cards, on one CPU: a process group whose seven other members are made up.

Collectives do nothing, so numbers mean nothing. What can be seen: who computes which pairs, how parameters are cut, and how
often a rank waits for its device.
"""

import json
import subprocess
import sys
from pathlib import Path

from tests.train.job.test_parallel import environment, write_config

SCRIPT = """
import json, os, sys
os.environ.update(RANK="3", LOCAL_RANK="3", WORLD_SIZE="8", LOCAL_WORLD_SIZE="8", MASTER_ADDR="127.0.0.1", MASTER_PORT="1")
import torch
import train.job.training
import train.model.logps
from accelerate.state import AcceleratorState, PartialState
from pathlib import Path
from torch.testing._internal.distributed.fake_pg import FakeStore
from tests.train.job.test_waits import Waits
from tests.train.model.attention.plain_varlen import use_segments
from train.job.prepare import open_inputs, open_pairs
from train.job.stopping import StopRequest
from train.job.training import build_trainer
from train.run import build_parser, load_config

class Patch:
    setattr = staticmethod(setattr)

def answered(state, bucket):
    future = torch.futures.Future()
    future.set_result(bucket.buffer())
    return future

copies = []
def copying(name):
    ordinary = getattr(torch.Tensor, name)
    setattr(torch.Tensor, name, lambda self, *a, **k: (copies.append(name), ordinary(self, *a, **k))[1])

train.model.logps.CHUNK_ROWS = 3
train.job.training.of_first = lambda compute: compute()  # the first process is made up too
torch.distributed.init_process_group("fake", store=FakeStore(), rank=3, world_size=8)
found = {}
for path in sys.argv[2:]:
    AcceleratorState._reset_state(reset_partial_state=True)
    inputs = open_inputs(load_config(build_parser().parse_args([path])))
    trainer = build_trainer(inputs, open_pairs(inputs), Path(sys.argv[1]), StopRequest())
    model, trainer.optimizer = trainer.accelerator.prepare(trainer.model, trainer.create_optimizer())
    trainer.model_wrapped = model
    strategy = inputs.config.parallel.strategy
    if strategy == "ddp":
        model.register_comm_hook(None, answered)
    calls = use_segments(Patch)
    pairs = [trainer.train_dataset.pairs[row] for row in trainer.batches.positions_of_step(1)]
    for name in ("cpu", "numpy", "item"):
        copying(name)
    with Waits() as cutting:
        step = trainer.cut_step(pairs, torch.device("cpu"))
    copies.clear()
    heads = []
    head = trainer.accelerator.unwrap_model(model).lm_head
    head.register_forward_pre_hook(lambda module, inputs: heads.append(inputs[0].shape[1]))
    with Waits() as waits:
        trainer.training_step(model, step)
    shards = [p.to_local().numel() * 8 / p.numel() if strategy == "fsdp2" else 1.0 for p in model.parameters()]
    mesh = next(model.parameters()).device_mesh.shape if strategy == "fsdp2" else None
    found[strategy] = {
        "rows": list(trainer.batches.positions_of_step(1)), "mesh": mesh, "shards": sorted(set(shards)),
        "batches": len(step.batches), "cutting": cutting.seen, "step": waits.seen, "copies": copies, "attentions": len(calls),
        "heads": heads, "scored": [len(batch["scored"]) for batch in step.batches],
    }
print(json.dumps(found))
"""


def test_a_rank_of_eight_waits_once_a_step_and_holds_an_eighth(settings, tmp_path: Path) -> None:
    changes = {"optim": {"pairs_per_step": 16, "tokens_per_batch": 20}}
    configs = [
        write_config(settings, tmp_path / name, parallel={"strategy": name}, **changes) for name in ("ddp", "fsdp2")
    ]
    command = [sys.executable, "-c", SCRIPT, str(tmp_path / "checkpoints"), *configs]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=180, check=False)
    assert done.returncode == 0, done.stderr[-6000:]
    found = json.loads(done.stdout.splitlines()[-1])
    for of in found.values():
        assert of["rows"] == [16 + 6, 16 + 7]  # the second step's pairs 6 and 7 are rank 3's
        assert of["batches"] == 2
        assert of["attentions"] == 2 * 2  # of two layers
        assert of["cutting"] == ["_local_scalar_dense"]  # how many micro-batches the others have
        assert of["step"] == of["copies"] == []
    # A sharded output layer is gathered in every call, so each rank makes as many calls: one for each micro-batch.
    assert found["fsdp2"]["heads"] == found["fsdp2"]["scored"]
    assert set(found["ddp"]["heads"]) <= {1, 2, 3}
    assert (found["ddp"]["mesh"], found["fsdp2"]["mesh"]) == (None, [8])
    assert found["fsdp2"]["shards"] == [1.0]  # 64 and 128 rows are multiples of 8
