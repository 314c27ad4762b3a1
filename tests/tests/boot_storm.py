# Many guests boot at once: one connection and one thread each, all reading the same recorded requests in the same
# order, every byte compared with the golden image. Run by nbdsh, which brings libnbd.
import json, mmap, os, threading, time

plan = json.load(open(os.environ["BOOT_PLAN"]))
raw = open(plan["raw"], "rb")
golden = memoryview(mmap.mmap(raw.fileno(), 0, prot=mmap.PROT_READ))
guests = []
for export in plan["exports"]:
    handle = nbd.NBD()
    handle.set_export_name(export)
    handle.connect_unix(plan["socket"])
    guests.append(handle)
start = threading.Barrier(len(guests) + 1)
failures = []


def boot(handle):
    try:
        start.wait()
        for offset, length in plan["requests"]:
            if handle.pread(length, offset) != golden[offset : offset + length]:
                raise Exception("other bytes than the golden image's at %d" % offset)
    except Exception as error:
        failures.append(str(error))


threads = [threading.Thread(target=boot, args=[handle]) for handle in guests]
for thread in threads:
    thread.start()
start.wait()
began = time.monotonic()
for thread in threads:
    thread.join()
took = time.monotonic() - began
for handle in guests:
    handle.shutdown()
print(json.dumps({"took_s": took, "failures": failures}))
