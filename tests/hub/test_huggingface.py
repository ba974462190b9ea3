"""A real huggingface_hub client, in a process of its own, against a hub look-alike on the loopback."""

from __future__ import annotations

import hashlib
import json
import os
import resource
import subprocess
import sys
import threading
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
from heads import head_settings, head_tensors, save_head
from hub_server import OLD, REPO, SHA, Hub
from tiny import tiny_folder
from tiny_gguf import write

from tinychat.base.errors import CheckpointError, DownloadError, MemoryBudgetError
from tinychat.hub.resuming import fetch
from tinychat.hub.transfer import check_room


@pytest.fixture
def hub(tmp_path):
    folder = tiny_folder(tmp_path / "source")
    files = {f.name: f.read_bytes() for f in folder.iterdir()}
    files |= {"pytorch_model.bin": b"never fetched", "training.log": b"nor this", "README.md": b"# tiny\n"}
    server = Hub(files)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture
def tinychat(hub, tmp_path):
    """Run a command; (exit code, stdout, stderr)."""

    def run(*args: str, largest: int | None = None, **env: str) -> tuple[int, str, str]:
        """largest: bytes that a file may have before the system says that there is no more room."""
        clean = {k: v for k, v in os.environ.items() if not k.startswith("HF_") and "proxy" not in k.lower()}
        clean |= {
            "HF_ENDPOINT": hub.url,
            "HF_HOME": str(tmp_path / "hf"),
            "TINYCHAT_HOME": str(tmp_path / "home"),
            "HF_HUB_DISABLE_TELEMETRY": "1",
        }
        command = [sys.executable, "-m", "tinychat", *args]
        limit = None
        if largest is not None:
            limit = partial(resource.setrlimit, resource.RLIMIT_FSIZE, (largest, largest))
        out = subprocess.run(
            command, capture_output=True, text=True, env=clean | env, timeout=120, preexec_fn=limit
        )
        return out.returncode, out.stdout, out.stderr

    return run


def installed(tinychat) -> list[str]:
    code, out, _ = tinychat("list", "--json")
    assert code == 0
    return [m["name"] for m in json.loads(out)]


def refused(result: tuple[int, str, str], code: int, *words: str) -> None:
    """Two lines, this exit code, these words."""
    assert result[0] == code, result
    what, todo = [line for line in result[2].splitlines() if not line.startswith("Downloading")][-2:]
    assert what.startswith("Error: ")
    assert todo
    for word in words:
        assert word in result[2], result[2]


def fetched(hub) -> set[str]:
    gets = (path for command, path, _ in hub.seen if command == "GET" and "/resolve/" in path)
    return {path.rpartition("/")[2] for path in gets}


def test_only_what_is_needed_is_fetched_and_the_revision_is_kept(hub, tinychat):
    code, out, err = tinychat("pull", REPO, "--json")
    assert code == 0, err
    path = Path(json.loads(out)["path"])
    assert fetched(hub) >= {"config.json", "model.safetensors", "tokenizer.json"}
    assert not fetched(hub) & {"pytorch_model.bin", "training.log"}
    assert installed(tinychat) == [REPO]
    assert json.loads((path / "manifest.json").read_text())["source"] == f"hf:{REPO}@{SHA}"
    before = len(hub.seen)
    assert tinychat("pull", REPO)[0] == 0
    code, out, _ = tinychat("run", REPO, "hi", "--temp", "0", "--max-tokens", "3", HF_HUB_OFFLINE="1")
    assert (code, len(hub.seen)) == (0, before)  # a model that is here needs no network


def test_a_revision_can_be_pinned(hub, tinychat):
    code, out, err = tinychat("pull", f"{REPO}@v1", "--json")
    assert code == 0, err
    manifest = json.loads((Path(json.loads(out)["path"]) / "manifest.json").read_text())
    assert manifest["source"] == f"hf:{REPO}@{OLD}"
    assert installed(tinychat) == [f"{REPO}@v1"]
    refused(tinychat("pull", f"{REPO}@nowhere"), 3, "revision nowhere")


def test_a_cut_connection_is_resumed_where_it_broke(hub, tinychat):
    tensors = safetensors.numpy.load(hub.files["model.safetensors"])
    tensors["padding"] = np.zeros(24_000_000, np.uint8)  # the client writes 10 MB at a time
    hub.files["model.safetensors"] = safetensors.numpy.save(tensors)
    hub.cuts = 1
    code, _, err = tinychat("pull", REPO)
    assert code == 0, err
    ranges = [r for command, path, r in hub.seen if command == "GET" and path.endswith("model.safetensors")]
    assert len(ranges) == 2
    assert ranges[0] is None
    assert ranges[1].startswith("bytes=")
    assert installed(tinychat) == [REPO]


def test_a_server_that_keeps_breaking_off_leaves_nothing_and_the_next_pull_goes_on(hub, tinychat):
    hub.cuts = 1000
    refused(tinychat("pull", REPO), 1, REPO)
    assert installed(tinychat) == []
    hub.cuts = 0
    assert tinychat("pull", REPO)[0] == 0
    assert installed(tinychat) == [REPO]


@pytest.mark.parametrize("promise", [{"sha256": "0" * 64}, {"size": 12345}])
def test_weights_that_are_not_what_was_promised_are_refused(hub, tinychat, promise):
    hub.promised["model.safetensors"] = promise
    refused(tinychat("pull", REPO), 1, "model.safetensors")
    assert installed(tinychat) == []
    hub.promised.clear()
    assert tinychat("pull", REPO)[0] == 0


@pytest.mark.parametrize(
    ("status", "headers", "code", "word"),
    [
        (401, {"X-Error-Code": "GatedRepo"}, 1, "HF_TOKEN"),
        (403, {"X-Error-Code": "GatedRepo"}, 1, "terms"),
        (404, {"X-Error-Code": "RepoNotFound"}, 3, "no repository"),
        (401, {"X-Error-Code": "RepoNotFound"}, 3, "no repository"),
        (429, {"Retry-After": "0"}, 1, "patience"),
        (500, {}, 1, "cannot be downloaded"),
    ],
)
def test_refusals_of_the_hub_are_told_in_two_lines(hub, tinychat, status, headers, code, word):
    hub.fail = (status, headers)
    refused(tinychat("pull", REPO), code, word)
    assert installed(tinychat) == []


def test_a_slow_server_is_waited_for(hub, tinychat):
    hub.pause = 0.2
    assert tinychat("pull", REPO)[0] == 0


def test_offline_asks_nobody(hub, tinychat):
    refused(tinychat("run", REPO, "hi", HF_HUB_OFFLINE="1"), 3, "offline")
    refused(tinychat("pull", REPO, HF_HUB_OFFLINE="1"), 3, "offline")
    assert hub.seen == []


def test_a_model_larger_than_memory_is_refused_before_a_byte_of_it(hub, tinychat):
    hub.promised["model.safetensors"] = {"size": 10**15}
    refused(tinychat("pull", REPO), 4, "memory", "Try ", "tinychat list")
    assert "model.safetensors" not in fetched(hub)


def test_a_model_of_an_unsupported_family_is_refused_before_a_byte_of_it(hub, tinychat):
    config = json.loads(hub.files["config.json"])
    hub.files["config.json"] = json.dumps(config | {"architectures": ["MambaForCausalLM"]}).encode()
    refused(tinychat("pull", REPO), 1, "MambaForCausalLM")
    assert fetched(hub) == {"config.json"}


def test_a_head_is_pulled_and_drafts_and_one_of_another_kind_is_refused_before_a_byte_of_it(
    hub, tinychat, tmp_path
):
    s = head_settings(eagle_aux_hidden_state_layer_ids=[0, 1, 2])
    folder = save_head(tmp_path / "head", s, head_tensors(s))
    files = {f.name: f.read_bytes() for f in folder.iterdir()}
    older = {**files, "config.json": json.dumps(s | dict(architectures=["LlamaForCausalLMEagle"])).encode()}
    hub.repos |= {"someone/head": files, "someone/older": older}
    code, out, err = tinychat(
        *("run", REPO, "hi", "--draft", "someone/head", "--draft-tokens", "3"),
        *("--temp", "0", "--max-tokens", "8", "--json"),
    )
    assert code == 0, err
    assert "No draft" not in err
    assert json.loads(out)["stats"]["drafted_tokens"] > 0
    assert installed(tinychat) == ["someone/head", REPO]
    refused(tinychat("pull", "someone/older"), 1, "EAGLE-1")


def test_one_gguf_of_several_is_fetched(hub, tinychat, tmp_path):
    write(tmp_path / "x.gguf")
    content = (tmp_path / "x.gguf").read_bytes()
    hub.files = {"tiny-q8_0.gguf": content, "tiny-q4_k_m.gguf": content, "README.md": b"#"}
    assert tinychat("pull", REPO)[0] == 0
    assert fetched(hub) == {"tiny-q4_k_m.gguf"}
    code, out, err = tinychat("show", REPO, "--json")
    assert code == 0, err
    assert json.loads(out)["sha256"] == hashlib.sha256(content).hexdigest()


def parts_of_a_model(folder: Path) -> dict[str, bytes]:
    """A model in three parts in a folder of the repo, as large ones are kept; two other models beside it."""
    write(folder / "tiny-Q4_K_M.gguf", split=8)
    parts = {f"Q4_K_M/{f.name}": f.read_bytes() for f in sorted(folder.glob("tiny-Q4_K_M-*.gguf"))}
    assert len(parts) == 3
    others = ("tiny-Q8_0.gguf", "Q5_K_M/tiny-Q5_K_M-00002-of-00002.gguf")
    return parts | dict.fromkeys(others, b"never fetched") | {"README.md": b"#"}


def test_all_parts_of_a_gguf_are_fetched_and_are_one_model(hub, tinychat, tmp_path):
    hub.files = parts_of_a_model(tmp_path)
    names = [Path(n).name for n in hub.files if n.startswith("Q4_K_M")]
    hub.cuts = 1
    code, out, err = tinychat("pull", REPO, "--json")
    assert code == 0, err
    assert fetched(hub) == set(names)
    folder = tmp_path / "home" / "models" / REPO.replace("/", "--")
    assert Path(json.loads(out)["path"]) == folder / names[0]
    assert {n: (folder / n).read_bytes() for n in names} == {n: hub.files[f"Q4_K_M/{n}"] for n in names}
    (listed,) = json.loads(tinychat("list", "--json")[1])
    assert listed["size"] > sum(len(hub.files[f"Q4_K_M/{n}"]) for n in names)
    assert json.loads(tinychat("show", REPO, "--json")[1])["parts"] == 3
    content = bytearray((folder / names[1]).read_bytes())
    content[-1] ^= 1
    (folder / names[1]).write_bytes(content)
    code, _, err = tinychat("pull", REPO)  # the second part rotted: it is read, found and fetched again
    assert code == 0, err
    assert f"{names[1]}: its content is not what was pulled" in err
    assert (folder / names[1]).read_bytes() == hub.files[f"Q4_K_M/{names[1]}"]
    assert tinychat("rm", REPO, "--yes")[0] == 0
    assert not folder.exists()


def test_a_part_that_is_damaged_or_missing_in_the_repo_is_refused(hub, tinychat, tmp_path):
    hub.files = parts_of_a_model(tmp_path)
    second = next(n for n in hub.files if "-00002-of-00003" in n)
    hub.promised[second] = {"sha256": "0" * 64}
    refused(tinychat("pull", REPO), 1, "-00002-of-00003.gguf", "hash is wrong")
    assert installed(tinychat) == []
    hub.promised.clear()
    del hub.files[second]
    hub.seen.clear()
    refused(tinychat("pull", REPO), 1, f"lacks {second}", "3 parts of Q4_K_M/tiny-Q4_K_M")
    assert not fetched(hub)
    refused(tinychat("pull", f"{REPO}/Q5_K_M/tiny-Q5_K_M-00002-of-00002.gguf"), 1, "-00001-of-00002.gguf")


def test_a_disk_that_fills_up_in_the_middle_leaves_nothing_and_the_next_pull_works(hub, tinychat, tmp_path):
    tensors = safetensors.numpy.load(hub.files["model.safetensors"])
    tensors["padding"] = np.zeros(24_000_000, np.uint8)
    hub.files["model.safetensors"] = safetensors.numpy.save(tensors)
    refused(tinychat("pull", REPO, largest=15_000_000), 1, "disk", "Free some space")
    assert installed(tinychat) == []
    assert not list(tmp_path.rglob("*.incomplete"))
    assert tinychat("pull", REPO)[0] == 0
    assert installed(tinychat) == [REPO]


def test_terms_of_a_licence_are_shown_when_a_model_is_pulled(hub, tinychat):
    hub.card = {"license": "other", "license_name": "gemma", "license_link": "https://ai.google.dev/gemma"}
    hub.gated = "manual"
    hub.files["LICENSE"] = ("Terms of Use\x1b[2J\n" + "Do no harm.\n" * 500).encode()
    code, _, err = tinychat("pull", REPO)
    assert code == 0, err
    assert "comes with terms (gemma)" in err
    assert "Terms of Use" in err
    assert "\x1b" not in err
    assert 20 < err.count("Do no harm.") < 60
    path = Path(json.loads(tinychat("show", REPO, "--json")[1])["path"])
    assert f"the whole text: {path / 'LICENSE'}" in err
    assert json.loads(tinychat("show", REPO, "--json")[1])["license"] == "gemma"
    assert "comes with terms" not in tinychat("pull", REPO)[2]  # it is here


def test_terms_without_a_text_are_named_with_their_page(hub, tinychat, tmp_path):
    write(tmp_path / "x.gguf")
    hub.files = {"tiny-q4_0.gguf": (tmp_path / "x.gguf").read_bytes(), "USE_POLICY.md": b"Be kind."}
    hub.card = {"license": "llama3.2"}
    code, _, err = tinychat("pull", REPO)
    assert code == 0, err
    assert "comes with terms (llama3.2)" in err
    assert "Be kind." in err
    del hub.files["USE_POLICY.md"]
    hub.card = {"license": "llama3.2", "license_link": "javascript:alert(1)"}
    assert tinychat("rm", REPO, "--yes")[0] == 0
    assert f"Read them: https://huggingface.co/{REPO}" in tinychat("pull", REPO)[2]


@pytest.mark.parametrize("license", ["apache-2.0", "mit", None])
def test_free_licences_need_no_word(hub, tinychat, license):
    hub.card = {"license": license} if license else {}
    hub.files["LICENSE"] = b"Do what you like."
    code, _, err = tinychat("pull", REPO)
    assert code == 0, err
    assert "comes with terms" not in err
    assert "Do what you like" not in err


def test_a_full_disk_is_seen_before_the_download(tmp_path):
    with pytest.raises(DownloadError, match="disk"):
        check_room(tmp_path, 1 << 60, 1)
    with pytest.raises(MemoryBudgetError, match="memory") as e:
        check_room(tmp_path, 1 << 60, 1 << 60)
    assert "Try " in e.value.todo


def test_a_weight_file_whose_name_leads_out_of_its_folder_is_refused(tmp_path):
    staging = tmp_path / "a" / "staging"
    staging.mkdir(parents=True)
    with pytest.raises(CheckpointError, match="elsewhere"):
        fetch(REPO, SHA, "../../x.gguf", 5, SHA, staging)
    assert list(tmp_path.rglob("*.gguf")) == []
