"""The base install, without torch: enough to list and read weight datasets."""

import subprocess

HEAVY = ("torch", "transformers", "datasets", "vllm", "prefect", "pydantic")


def run(python, *arguments):
    done = subprocess.run([str(python), "-P", *arguments], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_base_lists_shows_and_reads_weights(light_install, small_store):
    python, root = light_install(), small_store.root
    script = (
        "import sys; from importlib.util import find_spec; print([name for name in sys.argv[1:] if find_spec(name)])"
    )
    assert run(python, "-c", script, *HEAVY) == "[]\n"
    name = small_store.list()["name"][0]
    assert name in run(python, "-m", "tokenweights", "ls", "--store", str(root))
    assert "made from" in run(python, "-m", "tokenweights", "show", name, "--store", str(root))
    assert "no_prompt" in run(python, "-m", "tokenweights", "quarantine", "hh-harmless", "--store", str(root))
    script = "import sys; from weights_store import WeightStore; print(WeightStore(sys.argv[1]).list()['name'][0])"
    assert run(python, "-c", script, str(root)) == f"{name}\n"
    assert "complete" in run(python, "-m", "tokenweights", "completion", "bash")
