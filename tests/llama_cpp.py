"""llama.cpp itself, in this process: it loads a GGUF file, tokenises and generates."""

import json
import urllib.request
from pathlib import Path

import xllamacpp


class LlamaCpp:
    """A GGUF file in llama.cpp's server. One thread: with more, on a busy machine, the threads wait for one another."""

    def __init__(self, path: Path, context: int = 64):
        params = xllamacpp.CommonParams()
        params.model.path, params.n_ctx, params.n_parallel = str(path), context, 1
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = params.n_threads_http = 1
        params.warmup, params.verbosity = False, -1
        params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
        params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED  # it rounds to fp16
        self._server = xllamacpp.Server(params)

    def _post(self, path: str, body: dict) -> dict:
        headers = {"Content-Type": "application/json"}
        request = urllib.request.Request(self._server.listening_address + path, json.dumps(body).encode(), headers)
        with urllib.request.urlopen(request, timeout=120) as answer:
            return json.load(answer)

    def encode(self, text: str, bos: bool = False) -> list[int]:
        return self._post("/tokenize", {"content": text, "add_special": bos, "parse_special": False})["tokens"]

    def encode_chat(self, messages: list[dict]) -> list[int]:
        """By the file's own template, with the beginning of an answer."""
        text = self._post("/apply-template", {"messages": messages})["prompt"]
        return self._post("/tokenize", {"content": text, "add_special": True, "parse_special": True})["tokens"]

    def greedy(self, ids: list[int], n: int) -> list[int]:
        """The `n` most likely tokens after `ids`, fewer if eos comes."""
        body = {"prompt": ids, "n_predict": n, "temperature": 0, "cache_prompt": False, "return_tokens": True}
        return self._post("/completion", body)["tokens"]

    def log_probabilities(self, ids: list[int], n: int) -> dict[int, float]:
        """Token -> log-probability of the `n` most likely tokens after `ids`."""
        body = {"prompt": ids, "n_predict": 1, "temperature": 0, "cache_prompt": False, "n_probs": n}
        return {t["id"]: t["logprob"] for t in self._post("/completion", body)["completion_probabilities"][0]["top_logprobs"]}
