"""config.toml: what it may say, what holds for which model, and errors that name the line."""

from __future__ import annotations

import pytest

from tinychat.base.errors import UsageError
from tinychat.base.preferences import Preferences

WHOLE = """\
# mine
model = "some/model"
system = "Be brief."
theme = "light"

[sampling]
temperature = 0.5  # bold
stop = ["END"]

[load]
ctx = 4096

[models."some/model"]
system = "Be long."
sampling.temperature = 0

[models."a.gguf".load]
kv_bits = 8
"""


def read(tmp_path, text):
    path = tmp_path / "config.toml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return Preferences.read(path)


def test_a_file_of_an_editor_that_marks_utf_8_is_read_and_kept(tmp_path):
    p = read(tmp_path, b'\xef\xbb\xbfmodel = "x"\r\ntheme = "dark"  # mine\r\n')
    assert (p.model, p.theme) == ("x", "dark")
    p.keep_chat("y", None, {})
    assert (tmp_path / "config.toml").read_bytes() == b'model = "y"\r\ntheme = "dark"  # mine\r\n'


def test_what_a_model_s_section_says_holds_in_place_of_the_rest(tmp_path):
    p = read(tmp_path, WHOLE)
    assert (p.model, p.theme) == ("some/model", "light")
    one, other, third = p.of("some/model"), p.of("a.gguf"), p.of("another")
    assert (one.system, dict(one.sampling)) == ("Be long.", {"temperature": 0, "stop": ("END",)})
    assert dict(one.load) == {"ctx": 4096}
    assert (other.system, dict(other.load)) == ("Be brief.", {"ctx": 4096, "kv_bits": 8})
    assert (third.sampling["temperature"], dict(third.load)) == (0.5, {"ctx": 4096})


def test_no_file_says_nothing(tmp_path):
    p = Preferences.read(tmp_path / "config.toml")
    assert (p.model, p.theme, dict(p.of("x").load), p.of("x").system) == (None, None, {}, None)


@pytest.mark.parametrize(
    ("text", "line", "said"),
    [
        ("model = 5", 1, "model"),
        ('\nmodle = "x"', 2, "modle is not known"),
        ('theme = "pink"', 1, "dark, light, contrast"),
        ("[sampling]\n\ntemperature = -1", 3, "temperature is -1"),
        ("[sampling]\ntemprature = 1", 2, "temprature"),
        ('[models."a b"]\nx = 1\nload.ctx = 0', 2, "x is not known"),
        ('[models."a b"]\n# no\nload.ctx = 0', 3, "ctx is 0"),
        ('[models."a b".load]\nctx = "8"', 2, "ctx"),
        ("models = 3", 1, "section"),
        ("sampling = 3", 1, "section"),
        ("[load]\nctx = 1\nctx = 2", None, "ctx"),
        ("a = \n", 1, ""),
        ("[load\n", 1, ""),
        (b"\xff", None, "UTF-8"),
        ("a=" + "[" * 5000, None, ""),
    ],
)
def test_what_is_wrong_is_said_with_its_line(tmp_path, text, line, said):
    with pytest.raises(UsageError) as e:
        read(tmp_path, text)
    assert str(tmp_path / "config.toml") in e.value.what
    assert said in e.value.what
    if line is not None:
        assert f", line {line}: " in e.value.what


def test_a_folder_or_a_file_that_nobody_may_read_is_said(tmp_path):
    (tmp_path / "config.toml").mkdir()
    with pytest.raises(UsageError, match="cannot be read"):
        Preferences.read(tmp_path / "config.toml")


def test_defaults_of_a_chat_are_written_and_everything_else_stays(tmp_path):
    p = read(tmp_path, WHOLE)
    p.keep_chat("other", None, {"temperature": 0.25, "top_k": 3})
    text = (tmp_path / "config.toml").read_text()
    assert text.startswith("# mine\n")
    assert '[models."some/model"]\nsystem = "Be long."' in text
    again = Preferences.read(tmp_path / "config.toml")
    assert (again.model, again.general.system) == ("other", None)
    assert dict(again.general.sampling) == {"temperature": 0.25, "top_k": 3}
    assert dict(again.general.load) == {"ctx": 4096}
    again.keep_chat("other", "Say.", {})
    assert Preferences.read(tmp_path / "config.toml").general.system == "Say."
    fresh = Preferences(tmp_path / "new" / "config.toml")
    fresh.keep_chat("m", "s", {"stop": ("a", "b")})
    assert Preferences.read(fresh.path).general.sampling == {"stop": ("a", "b")}


def test_a_damaged_file_is_not_written_over(tmp_path):
    path = tmp_path / "config.toml"
    path.write_text("model = ")
    with pytest.raises(UsageError, match="line 1"):
        Preferences(path).keep_chat("m", None, {})
    assert path.read_text() == "model = "
