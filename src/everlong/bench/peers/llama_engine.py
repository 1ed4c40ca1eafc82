"""llama.cpp through the low-level calls of llama-cpp-python, on a GGUF file written from our weights."""

from __future__ import annotations

import ctypes
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...models.lm import LanguageModel
from ..engines import Engine, Unavailable
from .gguf_file import rounded, write

UBATCHES = (512, 2048)  # tokens that llama.cpp takes at once: its own default, and its default for a batch
TRIED = 1024  # tokens on which the faster of these is found


class LlamaCpp(Engine):
    """llama.cpp at PyTorch's number of threads. The file lives in a temporary folder until ``close``."""

    title = "llama.cpp"

    def __init__(self, model: LanguageModel, weights: str, *, tokens: int, batch: int = 1) -> None:
        import llama_cpp

        self.weights, self.rows, self._api = weights, batch, llama_cpp
        self.model, self.vocab_size, self._position = model, model.cfg.vocab_size, 0
        _be_quiet()
        self._folder = tempfile.TemporaryDirectory(prefix="everlong-bench-")
        path = Path(self._folder.name, "model.gguf")
        write(model, path, weights)
        llama_cpp.llama_backend_init()
        self._model = llama_cpp.llama_model_load_from_file(str(path).encode(), llama_cpp.llama_model_default_params())
        if not self._model:
            self._folder.cleanup()
            raise Unavailable(f"llama.cpp did not load a {weights} model of this architecture")
        self._batch = llama_cpp.llama_batch_init(max(*UBATCHES, batch), 0, 1)
        self._length, self._context = tokens * batch, None
        self._open(UBATCHES[0])
        if tokens >= TRIED:
            self._open(min(UBATCHES, key=self._seconds))

    def _seconds(self, ubatch: int) -> float:
        """How long a prompt takes in pieces of ``ubatch`` tokens."""
        self._open(ubatch)
        began = time.perf_counter()
        self.read(torch.zeros(1, TRIED, dtype=torch.int64))
        return time.perf_counter() - began

    def _open(self, ubatch: int) -> None:
        """A new context that takes ``ubatch`` tokens at once."""
        if self._context is not None:
            self._api.llama_free(self._context)
        wish = self._api.llama_context_default_params()
        wish.n_ctx, wish.n_seq_max = self._length, self.rows
        wish.n_batch = wish.n_ubatch = max(ubatch, self.rows)
        wish.n_threads = wish.n_threads_batch = torch.get_num_threads()
        if self.weights == "f32":  # by default keys, values and what flash attention makes of them are f16
            wish.type_k = wish.type_v = self._api.GGML_TYPE_F32
            wish.flash_attn_type = self._api.LLAMA_FLASH_ATTN_TYPE_DISABLED
        self._context, self._most = self._api.llama_init_from_model(self._model, wish), ubatch
        if not self._context:
            raise Unavailable(f"llama.cpp made no context of {self._length:,} tokens for a {self.weights} model")

    def read(self, tokens: Tensor) -> Tensor:
        """See ``Engine.read``: the rows one after the other, in pieces of ``ubatch`` tokens."""
        api = self._api
        api.llama_memory_clear(api.llama_get_memory(self._context), True)
        found = []
        for row, ids in enumerate(tokens.tolist()):
            for start in range(0, len(ids), self._most):
                piece = ids[start : start + self._most]
                self._fill([(token, start + i, row) for i, token in enumerate(piece)], last_only=True)
            found.append(self._logits(len(piece) - 1))
        self._position = tokens.shape[1]
        return torch.stack(found)

    def step(self, tokens: Tensor) -> Tensor:
        """See ``Engine.step``: one call for all rows."""
        self._fill([(token, self._position, row) for row, token in enumerate(tokens.tolist())], last_only=False)
        self._position += 1
        return torch.stack([self._logits(row) for row in range(len(tokens))])

    def _fill(self, entries: list[tuple[int, int, int]], *, last_only: bool) -> None:
        """Decode (token, position, row) entries; the logits of the last one, or of all."""
        batch = self._batch
        batch.n_tokens = len(entries)
        for i, (token, position, row) in enumerate(entries):
            batch.token[i], batch.pos[i], batch.n_seq_id[i] = token, position, 1
            batch.seq_id[i][0] = row
            batch.logits[i] = not last_only or i == len(entries) - 1
        code = self._api.llama_decode(self._context, batch)
        if code:
            raise RuntimeError(f"llama_decode returned {code} for {len(entries)} tokens at {entries[0][1]}")

    def _logits(self, index: int) -> Tensor:
        pointer = self._api.llama_get_logits_ith(self._context, index)
        array = ctypes.cast(pointer, ctypes.POINTER(ctypes.c_float * self.vocab_size)).contents
        return torch.frombuffer(array, dtype=torch.float32).clone()

    def truth(self) -> LanguageModel:
        """See ``Engine.truth``: with the weights as llama.cpp has rounded them."""
        return rounded(self.model, self.weights)

    def close(self) -> None:
        """Free the model and remove its file."""
        self._api.llama_batch_free(self._batch)
        self._api.llama_free(self._context)
        self._api.llama_model_free(self._model)
        self._folder.cleanup()


_silent: Any = None  # the callback must outlive the library's use of it


def _be_quiet() -> None:
    """Errors come as return codes; the log goes nowhere."""
    global _silent
    import llama_cpp

    if _silent is None:
        _silent = llama_cpp.llama_log_callback(lambda level, text, data: None)
        llama_cpp.llama_log_set(_silent, ctypes.c_void_p(0))


ENGINE = LlamaCpp
