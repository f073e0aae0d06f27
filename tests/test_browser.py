"""What people see: TensorBoard's page and the HTML report, in a headless Chromium driven by its own protocol."""

import base64
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import klrl
from klrl.analysis.report import ReportConfig, report

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="needs a browser: chromium or google-chrome on the PATH"),
]
# All text and all drawings of a page, through its shadow roots.
_READ = """(() => {
  const text = [], images = [];
  let lines = 0;
  const walk = node => {
    if (node.nodeType === 3) text.push(node.textContent.trim());
    if (['PATH', 'CANVAS'].includes(node.tagName?.toUpperCase())) lines++;
    if (node.tagName === 'IMG') images.push(node.naturalWidth);
    if (['STYLE', 'SCRIPT'].includes(node.tagName)) return;
    if (node.shadowRoot) walk(node.shadowRoot);
    node.childNodes.forEach(walk);
  };
  walk(document);
  return JSON.stringify({text: text.filter(Boolean).join(' '), lines, images});
})()"""


class Browser:
    """One page. Speaks the DevTools protocol over a pair of pipes."""

    def __init__(self, profile: Path) -> None:
        (to_child, self.write), (self.read, from_child) = os.pipe(), os.pipe()
        command = f"exec {CHROMIUM} --headless --no-sandbox --disable-gpu --no-first-run --remote-debugging-pipe"
        command += f" --user-data-dir={profile} --window-size=1500,1400 3<&{to_child} 4>&{from_child}"
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        self.process = subprocess.Popen(["bash", "-c", command], pass_fds=(to_child, from_child), **quiet)
        self.buffer, self.count, self.session = b"", 0, ""
        self.requests: list[str] = []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        self.call("Network.enable")

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        self.count += 1
        message = {"id": self.count, "method": method, "params": params}
        if self.session:
            message["sessionId"] = self.session
        os.write(self.write, json.dumps(message).encode() + b"\0")
        while True:
            while b"\0" not in self.buffer:
                self.buffer += os.read(self.read, 1 << 20)
            line, self.buffer = self.buffer.split(b"\0", 1)
            answer = json.loads(line)
            if answer.get("method") == "Network.requestWillBeSent":
                self.requests.append(answer["params"]["request"]["url"])
            if answer.get("id") == self.count:
                assert "error" not in answer, answer
                return answer["result"]

    def page(self, url: str, *wanted: str, lines: int = 0, picture: str) -> dict[str, Any]:
        """What the page shows, once it shows all that is ``wanted``; a picture of it is kept."""
        self.call("Page.navigate", url=url)
        deadline = time.monotonic() + 60
        while True:
            time.sleep(0.5)
            shown = json.loads(self.call("Runtime.evaluate", expression=_READ)["result"].get("value", "null") or "null")
            missing = [text for text in wanted if shown is None or text not in shown["text"]]
            if shown and not missing and shown["lines"] >= lines:
                break
            assert time.monotonic() < deadline, f"{missing} not shown, {shown}"
        time.sleep(1.0)  # for what fades in
        Path(picture).write_bytes(base64.b64decode(self.call("Page.captureScreenshot")["data"]))
        return shown  # type: ignore[no-any-return]

    def close(self) -> None:
        self.process.terminate()
        self.process.wait()
        os.close(self.write)
        os.close(self.read)


@pytest.fixture
def browser(tmp_path: Path) -> Iterator[Browser]:
    browser = Browser(tmp_path / "profile")
    yield browser
    browser.close()


@pytest.fixture
def runs() -> None:
    """Runs of the three agents, long enough for histograms."""
    small = {"n_envs": 2, "n_steps": 64, "batch_size": 64, "eval_every": 5, "quiet": True, "histogram_every": 2}
    for seed in (0, 1):
        klrl.train("ppo", "CartPole-v1", total_timesteps=3000, seed=seed, **small)
    klrl.train("trpo", "CartPole-v1", total_timesteps=3000, **small)
    sac = {
        "learning_starts": 100,
        "gradient_steps": 1,
        "hidden_sizes": [32],
        "kl": {"every": 200, "target": 0.5},
        "histogram_every": 2,
    }
    klrl.train("sac", "CartPole-v1", total_timesteps=2000, quiet=True, **sac)


def test_tensorboard_shows_kl_against_its_limit_for_three_agents(browser: Browser, runs: None) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "tensorboard.main", "--logdir", "runs", "--port", str(port), "--host", "127.0.0.1"]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    names = [path.name for path in Path("runs").iterdir()]
    assert len(names) == 4
    try:
        deadline = time.monotonic() + 60
        while not _answers(port):
            assert time.monotonic() < deadline
            time.sleep(0.2)
        url = f"http://127.0.0.1:{port}/#"
        charts = ("KL and its limit", "largest KL of a state", "coefficients: KL penalty, temperature", "entropy")
        browser.page(url + "custom_scalars", *charts, "return", lines=8, picture="custom_scalars.png")
        table = browser.page(url + "hparams", "eval/final_return", "kl.target", *names, picture="hparams.png")
        assert table["text"].count("CartPole-v1") >= 4
        browser.page(url + "histograms", "kl/log10_per_state", lines=1, picture="histograms.png")
    finally:
        server.terminate()
        server.wait()


def test_the_report_shows_every_figure_and_loads_nothing(browser: Browser, runs: None) -> None:
    path = Path(report(["runs"], ReportConfig("all.html"))).resolve()
    shown = browser.page(path.as_uri(), "Final scores", "Run by run", picture="report.png")
    assert len(shown["images"]) == len(re.findall("<img", path.read_text())) > 10
    assert all(width > 0 for width in shown["images"])
    assert {url.split(":")[0] for url in browser.requests} <= {"file", "data", "about"}


def _answers(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0
