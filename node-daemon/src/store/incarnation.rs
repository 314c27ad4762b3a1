//! The storage incarnation: says whether the kernel that took the store's unflushed writes is still the one running.

use std::fs::{self, File};
use std::io::{self, Read};
use std::os::fd::AsRawFd;

use hearth_protocol::{Incarnation, chain};

/// Kernel boot id and mount id of the directory, hashed. Equal values mean: what was handed to the kernel before is
/// still there, though the daemon died. A daemon in a mount namespace of its own gets another mount id at each start,
/// so its unit must not ask for one (docs/adr/0002).
///
/// # Errors
/// The operating system's, when `/proc` is missing.
pub fn of_directory(dir: &File) -> io::Result<Incarnation> {
    let boot = fs::read_to_string("/proc/sys/kernel/random/boot_id")?;
    let info = fs::read_to_string(format!("/proc/self/fdinfo/{}", dir.as_raw_fd()))?;
    let mount = info
        .lines()
        .find_map(|line| line.strip_prefix("mnt_id:"))
        .ok_or_else(|| io::Error::other("/proc/self/fdinfo has no mnt_id"))?;
    let hash = chain::part(format!("{}/{}", boot.trim(), mount.trim()).as_bytes());
    Ok(Incarnation(u128::from_be_bytes(
        hash[..16].try_into().expect("a hash has 32 bytes"),
    )))
}

/// 128 bits from the kernel's random source.
///
/// # Errors
/// The operating system's.
pub fn random_id() -> io::Result<u128> {
    let mut bytes = [0; 16];
    File::open("/dev/urandom")?.read_exact(&mut bytes)?;
    Ok(u128::from_be_bytes(bytes))
}
