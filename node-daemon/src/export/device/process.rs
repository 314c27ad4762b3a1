//! What the process and its threads must promise the kernel, because the kernel's own writeback runs through them:
//! when memory is short, the kernel cleans pages by writing them to our device, and a daemon that then waits for
//! memory waits for itself.

use std::io;

/// `include/uapi/linux/prctl.h`; the libc crate does not have it.
const PR_SET_IO_FLUSHER: libc::c_int = 57;

/// Tells the kernel that the calling thread, and those it starts from now on, are part of the write path
/// (`PR_SET_IO_FLUSHER`): their allocations never wait for writeback. Without `CAP_SYS_RESOURCE` it has no effect.
pub(super) fn mark_thread() -> bool {
    // SAFETY: the call takes plain integers and changes flags of the calling thread only.
    unsafe { libc::prctl(PR_SET_IO_FLUSHER, 1, 0, 0, 0) == 0 }
}

/// Prepares the process for serving kernel devices; to be called first thing in `main`, before threads start.
///
/// Marks it as part of the write path and, with `lock_memory`, keeps every page it touches in RAM, so that no page of
/// it is ever behind the device that it serves. Returns what could not be had, in words for the log.
pub fn prepare_process(lock_memory: bool) -> Vec<String> {
    let mut missing = Vec::new();
    if !mark_thread() {
        missing.push(format!(
            "PR_SET_IO_FLUSHER: {}; give the daemon CAP_SYS_RESOURCE, else it may stall when memory is short",
            io::Error::last_os_error()
        ));
    }
    // Only pages in use are locked: stacks and buffers are much larger than what they fill.
    let flags = libc::MCL_CURRENT | libc::MCL_FUTURE | libc::MCL_ONFAULT;
    // SAFETY: the call takes plain integers and changes no memory contents.
    if lock_memory && unsafe { libc::mlockall(flags) } != 0 {
        missing.push(format!(
            "mlockall: {}; raise the memlock limit (LimitMEMLOCK=infinity) or give the daemon CAP_IPC_LOCK",
            io::Error::last_os_error()
        ));
    }
    missing
}
