"""A folder that looks like llama.cpp's: a converter that copies, a quantizer that copies, a server that says little.

They stand in for what happens between processes: what is found, called, said and left behind. What llama.cpp itself
makes of a model is tested with the real one (test_gguf.py), where LLAMA_CPP names it.
"""

from __future__ import annotations

import stat
import sys
from pathlib import Path

CONVERTER = """\
import argparse, pathlib, sys
parser = argparse.ArgumentParser()
parser.add_argument("model", type=pathlib.Path)
parser.add_argument("--outfile", type=pathlib.Path)
parser.add_argument("--outtype")
args = parser.parse_args()
fail = pathlib.Path(__file__).with_name("fail")
if fail.exists():
    sys.exit(fail.read_text())
args.outfile.write_text(f"{args.outtype} of {sorted(p.name for p in args.model.glob('*.safetensors'))}")
"""
QUANTIZER = """\
import pathlib, sys
source, file, kind = sys.argv[1:]
pathlib.Path(file).write_text(f"{kind} of {pathlib.Path(source).read_text()}")
"""
#: Begins to listen at once, loads for a while, and answers with what it was asked.
SERVER = """\
import http.server, json, sys, time
file, port = sys.argv[sys.argv.index("--model") + 1], int(sys.argv[sys.argv.index("--port") + 1])
if "bad" in file:
    sys.exit("error: wrong magic")
start = time.monotonic()
class Handler(http.server.BaseHTTPRequestHandler):
    def answer(self, value, code=200):
        self.send_response(code); self.end_headers(); self.wfile.write(json.dumps(value).encode())
    def do_GET(self):
        self.answer({}, 200 if time.monotonic() > start + 0.2 else 503)
    def do_POST(self):
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.path == "/tokenize":
            return self.answer({"tokens": [ord(c) for c in asked["content"]]})
        if not asked["prompt"]:
            return self.answer({"error": "empty prompt"}, 400)
        last = asked["prompt"][-1]
        top = [{"id": last + i, "logprob": -1.0 - i} for i in range(asked.get("n_probs", 0))]
        told = [{"top_logprobs": top}] if asked.get("logit_bias") == [[97, 10000.0]] else []  # else half a character
        tokens = [last + i for i in range(1, asked["n_predict"] + 1)]
        self.answer({"tokens": tokens, "completion_probabilities": told})
    def log_message(self, *args):
        pass
http.server.HTTPServer(("127.0.0.1", port), Handler).serve_forever()
"""


def make(folder: Path, *programs: str) -> Path:
    """Make the folder with the converter and some of "llama-quantize" and "llama-server"."""
    (folder / "build" / "bin").mkdir(parents=True)
    (folder / "convert_hf_to_gguf.py").write_text(CONVERTER)
    for name, text in (("llama-quantize", QUANTIZER), ("llama-server", SERVER)):
        if name in programs:
            file = folder / "build" / "bin" / name
            file.write_text(f"#!{sys.executable}\n{text}")
            file.chmod(file.stat().st_mode | stat.S_IXUSR)
    return folder
