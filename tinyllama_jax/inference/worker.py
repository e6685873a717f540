"""The thread that owns the engine: requests come in through a queue, and results go out to the event loop."""

import asyncio
import contextlib
import queue
import threading
import traceback
from collections.abc import Callable

from tinyllama_jax.base.errors import UserError
from tinyllama_jax.inference.engine import Engine, Request
from tinyllama_jax.inference.sampling import Sampling

# (number of the request in its group, its tokens so far, why it ended) or, instead of a number, an error
Notify = Callable[[int | Exception | None, int, str | None], None]


class Worker(threading.Thread):
    """Runs the engine. `submit` and `cancel` may be called from the event loop's thread; nothing else touches the engine."""

    def __init__(self, engine: Engine, loop: asyncio.AbstractEventLoop):
        super().__init__(name="engine", daemon=True)
        self._engine, self._loop = engine, loop
        self._inbox: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._live: dict[Request, tuple[Notify, int]] = {}
        self.ready, self.failed = False, False

    def submit(self, requests: list[Request], notify: Notify) -> None:
        """Queues requests. `notify(None, 0, None)` follows if the engine takes them all, `notify(UserError, 0, None)` if not;
        then a call whenever one has new tokens, and one with the reason at its end."""
        self._inbox.put(lambda: self._submit(requests, notify))

    def cancel(self, requests: list[Request]) -> None:
        """Takes requests from the engine before its next step, after which `notify` is not called for them."""
        self._inbox.put(lambda: self._cancel(requests))

    def stop(self) -> None:
        """Ends the thread after its current step."""
        self._inbox.put(None)

    def _submit(self, requests: list[Request], notify: Notify) -> None:
        try:
            for i, request in enumerate(requests):
                self._engine.submit(request)
                self._live[request] = notify, i
        except UserError as error:
            self._cancel(requests)
            self._call(notify, error, 0, None)
        else:
            self._call(notify, None, 0, None)

    def _cancel(self, requests: list[Request]) -> None:
        for request in requests:
            if self._live.pop(request, None):
                self._engine.cancel(request)

    def _call(self, notify: Notify, *arguments: object) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed
            self._loop.call_soon_threadsafe(notify, *arguments)

    def run(self) -> None:
        """The thread. If the engine fails, every request gets the error, and `failed` stays true."""
        try:
            self._warm_up()
            self.ready = True
            while self._run_tasks():
                for request in self._engine.step() if self._engine.busy else ():
                    if request in self._live:
                        self._tell(request)
        except Exception as error:
            traceback.print_exc()
            self.ready, self.failed = False, True
            for notify, _ in self._live.values():
                self._call(notify, error, 0, None)

    def _run_tasks(self) -> bool:
        """Runs the tasks in the inbox, and waits for one while the engine is idle. Returns False if the thread is to stop."""
        with contextlib.suppress(queue.Empty):
            while True:
                task = self._inbox.get(block=not self._engine.busy)
                if task is None:
                    return False
                task()
        return True

    def _tell(self, request: Request) -> None:
        notify, i = self._live[request]
        if request.finish:
            del self._live[request]
        self._call(notify, i, len(request.tokens), request.finish)

    def _warm_up(self) -> None:
        """Compiles the programs that most requests need, so that no request waits for them."""
        prompt = [0] * min(20, self._engine.context - 1)
        for sampling in (Sampling(temperature=0.0), Sampling(top_p=0.9)):
            for _ in self._engine.stream(Request(prompt, 17, sampling, top_logprobs=1)):
                pass
