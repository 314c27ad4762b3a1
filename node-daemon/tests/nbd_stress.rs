//! libnbd with many requests in flight on several connections at once, checked byte by byte.

mod nbd_support;

use std::sync::Arc;

use hearth_node::export::nbd::memory::MemoryDisk;
use nbd_support::{Served, have, ok};

/// Each connection owns a quarter of the disk and keeps 32 requests in flight there; every read is compared with what
/// was written last, ranges in flight never overlap, and at the end each connection reads what the others wrote.
const SCRIPT: &str = r#"
import random
CONNECTIONS, DEPTH, STEPS = 4, 32, 1500
handles = [h]
for _ in range(CONNECTIONS - 1):
    other = nbd.NBD()
    other.connect_uri(uri)
    handles.append(other)
assert all(one.can_multi_conn() for one in handles)
size = h.get_size()
share = size // CONNECTIONS
rng = random.Random(7)
model = bytearray(size)

class Lane:
    def __init__(self, handle, base):
        self.handle, self.base, self.left, self.busy = handle, base, STEPS, []
    def start(self):
        for _ in range(8):
            length = rng.choice([1, 511, 512, 4096, 4097, 65536, 200000])
            offset = self.base + rng.randrange(share - length)
            if all(offset + length <= o or o + l <= offset for _, o, l, _, _ in self.busy):
                break
        else:
            return False
        kind = rng.randrange(10)
        if kind < 5:
            buf = nbd.Buffer(length)
            cookie = self.handle.aio_pread(buf, offset)
            self.busy.append((cookie, offset, length, buf, bytes(model[offset:offset + length])))
        else:
            if kind < 8:
                data = rng.randbytes(length)
                flags = nbd.CMD_FLAG_FUA if kind == 7 else 0
                cookie = self.handle.aio_pwrite(nbd.Buffer.from_bytearray(bytearray(data)), offset, flags=flags)
            elif kind == 8:
                data = bytes(length)
                cookie = self.handle.aio_zero(length, offset)
            else:
                data = bytes(length)
                cookie = self.handle.aio_zero(length, offset, flags=nbd.CMD_FLAG_NO_HOLE)
            model[offset:offset + length] = data
            self.busy.append((cookie, offset, length, None, None))
        self.left -= 1
        return True
    def reap(self):
        kept = []
        for entry in self.busy:
            cookie, offset, length, buf, expected = entry
            if self.handle.aio_command_completed(cookie):
                if buf is not None:
                    assert bytes(buf.to_bytearray()) == expected, (offset, length)
            else:
                kept.append(entry)
        self.busy = kept

lanes = [Lane(one, n * share) for n, one in enumerate(handles)]
while any(lane.left or lane.busy for lane in lanes):
    for lane in lanes:
        while lane.left and len(lane.busy) < DEPTH and lane.start():
            pass
        if lane.busy:
            lane.handle.poll(0 if lane.left else 10)
        lane.reap()
handles[0].flush()
for number, one in enumerate(handles):
    for offset in range(0, size, 1 << 20):
        assert one.pread(1 << 20, offset) == bytes(model[offset:offset + (1 << 20)]), (number, offset)
for one in handles:
    one.shutdown()
"#;

#[test]
fn several_connections_with_many_requests_see_one_disk() {
    if !have(&["nbdsh"]) {
        return;
    }
    let disk = Arc::new(MemoryDisk::new(16 << 20));
    (0..disk.blocks())
        .step_by(3)
        .for_each(|block| disk.set_in_ram(block, false));
    let served = Served::new(disk);
    let uri = format!("uri = '{}'", served.uri());
    ok("nbdsh", &["-u", &served.uri(), "-c", &uri, "-c", SCRIPT]);
}
