"""An emulated engine as a process: ``python engine_process.py PORT SPEEDUP``, until SIGTERM."""

import asyncio
import signal
import sys

from builders import a_pool
from concertmaster.engines.emulator import Emulator
from concertmaster.engines.emulator_api import serve
from concertmaster.sim.engines import engine_settings

SEATS = 2


async def main(port: int, speedup: float) -> None:
    pool = a_pool(max_sequences=SEATS)
    emulator = Emulator(
        model_name="m", curve=pool.curve, settings=engine_settings(pool), speedup=speedup
    )
    ended = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, ended.set)
    async with await serve(emulator, "127.0.0.1", port):
        await ended.wait()


if __name__ == "__main__":
    asyncio.run(main(int(sys.argv[1]), float(sys.argv[2])))
