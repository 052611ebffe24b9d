"""Takes a lease and says how it went: `held GENERATION` or `refused`; then `check` on its input,
until that ends."""

import sys

from cluster.storage.lease import Lease, LeaseHeldError, LeaseLostError
from cluster.storage.uris import open_storage

if __name__ == "__main__":
    uri, interval_s, timeout_s = sys.argv[1], float(sys.argv[2]), float(sys.argv[3])
    print("ready", flush=True)
    sys.stdin.readline()
    try:
        with Lease(open_storage(uri), interval_s=interval_s, timeout_s=timeout_s) as lease:
            print(f"held {lease.generation}", flush=True)
            for _ in sys.stdin:
                try:
                    lease.check()
                    print("still held", flush=True)
                except LeaseLostError as error:
                    print(error, flush=True)
    except LeaseHeldError:
        print("refused", flush=True)
