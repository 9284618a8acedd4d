"""A fuzzer of what loading reads: headers, plans, indexes and configurations. `make fuzz` runs it.

    PYTHONPATH=.:bench python tools/fuzz_loader.py CORPUS [-max_total_time=3600] [other options]

atheris looks for inputs that reach new code; CORPUS keeps them. Options are those of libFuzzer.
Half of the changes are of values in the JSON, the others are libFuzzer's own. An exception that is
not BadInput, an input that takes 10 s, and 2 GB of memory end the run. The input stays beside the
corpus as finding-*, or as libFuzzer's timeout-* and oom-*. tests/bench/test_fuzz.py is the short
form, without atheris.
"""

import hashlib
import random
import sys
import tempfile
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["lowtide", "json"]):
    from faulty import fuzz

SECONDS = 10
MEGABYTES = 2048


def main() -> None:
    corpus = Path(sys.argv[1])
    corpus.mkdir(parents=True, exist_ok=True)
    for number, seed in enumerate(fuzz.seeds()):
        (corpus / f"seed-{number}").write_bytes(seed)
    room = Path(tempfile.mkdtemp(prefix="fuzz-"))

    def one(data: bytes) -> None:
        try:
            fuzz.attempt(data, room)
        except Exception:
            # libFuzzer is not always able to keep the input of a Python exception.
            (corpus.parent / f"finding-{hashlib.sha256(data).hexdigest()[:12]}").write_bytes(data)
            raise

    def mutator(data: bytes, most: int, seed: int) -> bytes:
        rng = random.Random(seed)
        if rng.random() < 0.5:
            return atheris.Mutate(data, most)
        return fuzz.mutated(data, rng)[:most]

    limits = [f"-max_len={fuzz.LONGEST}", f"-timeout={SECONDS}", f"-rss_limit_mb={MEGABYTES}"]
    atheris.Setup([sys.argv[0], *limits, *sys.argv[1:]], one, custom_mutator=mutator)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
