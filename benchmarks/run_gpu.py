"""Everything about d2it that needs a GPU, in one command and ten minutes; `make gpu` runs it.

    python benchmarks/run_gpu.py                        # all parts
    python benchmarks/run_gpu.py smoke attn_bench       # these parts alone
    python benchmarks/run_gpu.py --list

Parts, in order:

- build: the CUDA extension, in place, for this GPU
- smoke: every operator at its smallest and at one real shape, forward and backward, against float64, each in a process
- warm: what the benchmarks compile, beside the two before
- the benchmarks of the operators, alone on the device, the shapes of the goals first; goals: the table of them
- the benchmarks of whole models
- tests: tests/kernels in shards and every test marked gpu; a shard goes on after a test that takes the device with it,
  and that test is named
- assertions: what a kernel asserts of its input, in processes of their own
- profile: six kernels under ncu; memcheck, racecheck: our kernels under compute-sanitizer; a limit here is no failure
- plots

`quality`, the scored benchmark of whole models, runs only where it is named. Needs no network and only what the
environment has; a part whose package is absent is skipped by its name. A benchmark writes its file after every case.
Every process ends with this one, however it ends.

Logs go to runs/gpu/, results to benchmarks/results/<device>/. Where $OUT names a folder, it holds both as gpu.tar.gz:
first before PyTorch is imported, with the machine, its packages and the parts; then anew every 20 seconds; whole at any
moment. Exit status 1 where a part failed.
"""

from __future__ import annotations

import argparse
import os
import signal
import traceback
from pathlib import Path

from gpu_run.bundle import Bundle, write_start, write_versions
from gpu_run.plan import default_parts, known_parts


def main() -> int:
    known = known_parts()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(known)}; all but quality by default")
    parser.add_argument("--minutes", type=float, default=9.5, help="for all parts together")
    parser.add_argument("--out", type=Path, metavar="DIR", help="where results go, not benchmarks/results/<device>")
    parser.add_argument("--list", action="store_true", help="name the parts and stop")
    parser.add_argument("--without-gpu", action="store_true", help="rehearse the same parts on the CPU, small")
    args = parser.parse_args()
    if args.list:
        print("\n".join(known))
        return 0
    if unknown := [part for part in args.parts if part not in known]:
        parser.error(f"no part {', '.join(unknown)}; there are {', '.join(known)}")
    chosen = args.parts or default_parts()
    bundle = Bundle()

    def stop(number: int, _: object) -> None:
        # At once: what runs in threads would be waited for. The children end with this process.
        bundle.write()
        bundle.tidy()
        os._exit(128 + number)

    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, stop)
    write_start(chosen, args.minutes)
    with bundle:
        try:
            write_versions()
            bundle.write()
            # Here and no earlier: PyTorch takes seconds to import, and may be what fails.
            from gpu_run import parts

            return parts.run_all(chosen, args, bundle)
        except Exception:
            traceback.print_exc()  # into the bundle, too
            return 1


if __name__ == "__main__":
    raise SystemExit(main())
