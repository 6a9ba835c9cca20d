"""How the threads of one kernel share out its work: phases, each a number of tasks to be taken.

A thread takes the next task of a phase, whichever it is, and when none is left waits until the
tasks of the others are done: never for a thread that has taken none. So a thread that comes late
(its core belongs to the server just then) costs nothing but its help, and one thread alone, or
one after another, get through as well. Plain functions for numba's kernels; they know no model.
"""

import atexit
import ctypes
import functools
import logging
import os
import threading
from collections.abc import Callable
from contextlib import suppress
from queue import SimpleQueue
from typing import Any

import numba
import numpy as np
from llvmlite import binding, ir
from numba.core import cgutils, types

from engine.cpu_features import ARM, processor
from engine.cpu_ir import call
from engine.cpu_math import Array

logger = logging.getLogger(__name__)

Kernel = Callable[..., None]  # compiled, and without the interpreter's lock while it runs
_Call = tuple[Kernel, tuple[Any, ...], list[Exception]]  # and what the other threads raised

_libc = ctypes.CDLL(None)

_NEVER = -(2**62)  # more tasks done than that are less than none, however many follow
_COURTESY = 1000  # pauses: some 15 microseconds
_PATIENCE = 2000  # looks at a count before the core is offered to others: some 30 microseconds


class GivenUp(Exception):  # noqa: N818
    """Another thread's part of this kernel failed, so its tasks will never be done."""


class Team:
    """Threads that run the same kernel side by side, the caller's among them.

    The call ends when the caller's own part does, and a kernel of phases ends when its tasks are
    done: a thread that is late then finds none, and touches nothing but the counts. A parallel
    loop of a compiler's would wait for it, and takes as long again to compile.

    Where a thread's part fails with tasks taken and not done, the call fails in all threads.
    """

    def __init__(self, num_threads: int) -> None:
        self.num_threads = num_threads
        self._threads: list[threading.Thread] = []
        self._inboxes: list[SimpleQueue[_Call | None]] = []
        for thread in range(1, num_threads):
            inbox: SimpleQueue[_Call | None] = SimpleQueue()
            self._inboxes.append(inbox)
            name = f"kvik-cpu-{thread}"
            follower = threading.Thread(
                target=self._follow, args=(thread, inbox), name=name, daemon=True
            )
            follower.start()
            self._threads.append(follower)
        # Only Linux tells and takes it.
        self._cores = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set()
        self._core = -1

    def run(self, kernel: Kernel, counts: Array, *arguments: Any) -> None:
        """Call `kernel(thread, num_threads, counts, *arguments)` in every thread, the caller's 0.

        `counts` are those of the kernel's phases. Raises what the kernel raised, in any thread.
        """
        if self._inboxes and len(self._cores) > 1:
            self._keep_apart()
        all_arguments = (self.num_threads, counts, *arguments)
        errors: list[Exception] = []
        for inbox in self._inboxes:
            inbox.put((kernel, all_arguments, errors))
        try:
            kernel(0, *all_arguments)
        except GivenUp:
            raise errors[0] from None
        except BaseException:
            _give_up(counts)
            raise

    def stop(self) -> None:
        """Let the other threads end, once they are through with what they were given."""
        for inbox in self._inboxes:
            inbox.put(None)
        for thread in self._threads:
            thread.join()

    def _follow(self, thread: int, inbox: "SimpleQueue[_Call | None]") -> None:
        while (call := inbox.get()) is not None:
            kernel, arguments, errors = call
            try:
                kernel(thread, *arguments)
            except GivenUp:
                pass
            except Exception as error:  # whatever it is: the others must not wait for us for ever
                logger.exception("kernel failed thread=%d", thread)
                errors.append(error)
                _give_up(arguments[1])
            del call, kernel, arguments, errors  # arrays that a step has outgrown may go

    def _keep_apart(self) -> None:
        """Keep the other threads off the caller's core.

        The system likes to wake a thread where it was woken from, and to move it milliseconds
        later: by then the step is over. It may refuse, where the process has been given other
        cores since or may not choose: a step is slower for it, and no more.
        """
        core = _libc.sched_getcpu()
        if core == self._core:
            return
        self._core = core
        others = self._cores - {core}
        for thread in self._threads:
            assert thread.native_id is not None
            with suppress(OSError):
                os.sched_setaffinity(thread.native_id, others)


@functools.cache
def team(num_threads: int) -> Team:
    """The threads of this process, as many in all: there is no use in more of them than cores."""
    found = Team(num_threads)
    # An interpreter that ends while a thread comes back from a kernel aborts the process.
    atexit.register(found.stop)
    return found


def _give_up(counts: Array) -> None:
    """Let nobody wait any more for tasks that a thread took and will not finish."""
    counts[:, 1, 0] = _NEVER


def counters(num_phases: int) -> Array:
    """Make the counts of tasks taken and done of each phase, a cache line each."""
    return np.zeros((num_phases, 2, 8), np.int64)


def _place(context: Any, builder: Any, signature: Any, arguments: Any, which: int) -> Any:
    """The address of a phase's count of tasks taken (0) or done (1)."""
    kind, (array, phase) = signature.args[0], arguments
    found = context.make_array(kind)(context, builder, array)
    indices = [phase, *(ir.Constant(phase.type, index) for index in (which, 0))]
    return cgutils.get_item_pointer(context, builder, kind, found, indices)


@numba.extending.intrinsic
def take(context: Any, counts: Any, phase: Any) -> Any:
    """Take the next task of a phase: its number, or one too high when none is left."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        taken = _place(context, builder, signature, arguments, 0)
        return builder.atomic_rmw("add", taken, ir.Constant(ir.IntType(64), 1), "monotonic")

    return types.intp(counts, types.intp), generate


@numba.extending.intrinsic
def finish(context: Any, counts: Any, phase: Any) -> Any:
    """Tell that a task is done, and with it everything that it wrote."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        done = _place(context, builder, signature, arguments, 1)
        builder.atomic_rmw("add", done, ir.Constant(ir.IntType(64), 1), "release")
        return context.get_dummy_value()

    return types.void(counts, types.intp), generate


@numba.extending.intrinsic
def _num_done(context: Any, counts: Any, phase: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        done = _place(context, builder, signature, arguments, 1)
        return builder.load_atomic(done, "acquire", 8)

    return types.intp(counts, types.intp), generate


@numba.extending.intrinsic
def _yield_core(context: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        kind = ir.FunctionType(ir.IntType(32), [])
        function = cgutils.get_or_insert_function(builder.module, kind, "sched_yield")
        builder.call(function, [])
        return context.get_dummy_value()

    return types.void(), generate


@numba.extending.intrinsic
def _pause(context: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        if processor()[0] == "x86_64":
            call(builder, "llvm.x86.sse2.pause", ir.VoidType())
        elif processor()[0] in ARM:
            # A barrier takes about as long; ARM's own `yield` takes no time at all.
            call(builder, "llvm.aarch64.isb", ir.VoidType(), ir.Constant(ir.IntType(32), 15))
        return context.get_dummy_value()

    return types.void(), generate


@numba.extending.intrinsic
def _stamp(context: Any, counts: Any, phase: Any) -> Any:
    """Note the processor's clock beside the count of what is done, where programs may read one."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        kind = ir.FunctionType(ir.IntType(64), [])
        if processor()[0] == "x86_64":
            clock = cgutils.get_or_insert_function(builder.module, kind, "llvm.readcyclecounter")
        elif processor()[0] in ARM:
            # LLVM's own would be the counter of cycles, which most systems keep to themselves. And
            # without a parser, which numba asks for nowhere, it ends the process at this line.
            binding.initialize_native_asmparser()
            clock = ir.InlineAsm(kind, "mrs $0, cntvct_el0", "=r", side_effect=True)
        else:
            return context.get_dummy_value()
        done = _place(context, builder, signature, arguments, 1)
        at = builder.gep(done, [ir.Constant(ir.IntType(32), 1)])
        builder.store_atomic(builder.call(clock, []), at, "monotonic", 8)
        return context.get_dummy_value()

    return types.void(counts, types.intp), generate


@numba.extending.register_jitable
def leave(thread: Any) -> None:
    """End a thread's part of a kernel, the caller's first.

    Behind a kernel every thread wants the interpreter's lock, and whoever has to wait for it
    sleeps: that had better not be the one that has a step to end.
    """
    if thread > 0:
        for _ in range(_COURTESY):
            _pause()


def phase_ends(counts: Array) -> Array:
    """When the phases of a run ended, by a clock of the processor's own."""
    return counts[:, 1, 1]


@numba.extending.register_jitable
def wait(counts: Any, phase: Any, num_tasks: Any) -> None:
    """Wait until all tasks of a phase are done, and see what they wrote.

    Raises GivenUp where a thread failed: then they never will be.
    """
    looks = 0
    while _num_done(counts, phase) < num_tasks:
        looks += 1
        if looks < _PATIENCE:
            _pause()
        elif _num_done(counts, phase) < 0:
            raise GivenUp
        else:
            _yield_core()
    _stamp(counts, phase)
