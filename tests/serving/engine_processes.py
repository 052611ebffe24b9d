"""An engine process of a test, and a script that plays the replica of one."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import psutil

from cluster.settings.serve import EngineConfig
from serving.engine_process.client import EngineClient

START = """
import asyncio, sys
from pathlib import Path
from cluster.settings.serve import EngineConfig
from serving.engine_process.client import EngineClient

async def main():
    client = await EngineClient.start(Path(sys.argv[1]), config=EngineConfig(max_num_seqs=2), eos_id=None, threads=1)
    print(client.pid, flush=True)
    await asyncio.sleep(600)

asyncio.run(main())
"""


@asynccontextmanager
async def engine(checkpoint: Path, *, num_slots: int = 4) -> AsyncIterator[EngineClient]:
    client = await EngineClient.start(
        checkpoint, config=EngineConfig(max_num_seqs=num_slots), eos_id=None, threads=1
    )
    try:
        yield client
    finally:
        await client.close()
    assert not psutil.pid_exists(client.pid)
