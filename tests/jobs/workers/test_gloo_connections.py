"""Connections are cut for who waits at either end; those of other threads, and what else is open, stay."""

import socket
import threading

from jobs.workers.gloo_connections import cut, open_connections
from tests.time_limits import limit_s


def test_who_waits_at_a_cut_connection_is_told_and_others_stay_open() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener, socket.create_server(("127.0.0.1", 0)) as store:
        address, store_address = listener.getsockname(), store.getsockname()
        with socket.create_connection(address) as earlier, listener.accept()[0] as earlier_end:
            before = open_connections(but_with=store_address[1])
            with (
                socket.create_connection(address) as later,
                listener.accept()[0] as later_end,
                socket.create_connection(store_address) as to_store,
                store.accept()[0] as store_end,
                socket.socket(socket.AF_UNIX),
            ):
                opened = open_connections(but_with=store_address[1]) - before
                assert {connection.descriptor for connection in opened} == {later.fileno(), later_end.fileno()}
                received: list[bytes] = []
                waiting = threading.Thread(target=lambda: received.append(later.recv(1)), daemon=True)
                waiting.start()
                cut(opened)
                waiting.join(limit_s(10))
                assert received == [b""]
                for end, other in ((earlier, earlier_end), (to_store, store_end)):
                    end.sendall(b"x")
                    assert other.recv(1) == b"x"
            with socket.create_connection(address) as newest, listener.accept()[0] as newest_end:
                cut(opened)  # whose descriptors these two may have now
                newest.sendall(b"y")
                assert newest_end.recv(1) == b"y"
