//! KVM or software emulation: decided by running a machine, because on some hosts KVM opens, creates machines, and
//! then does not run them, or runs them slower than software does.

use std::fs;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

/// How QEMU executes a guest's instructions.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Accel {
    /// The processor does.
    Kvm,
    /// QEMU translates them.
    Tcg,
}

impl Accel {
    /// QEMU's name for it.
    pub fn name(self) -> &'static str {
        match self {
            Accel::Kvm => "kvm",
            Accel::Tcg => "tcg",
        }
    }
}

/// The program of the probe: as a disk's first sector it writes 0x31 to port 0xf4, where QEMU's exit device turns it
/// into exit status `0x31 * 2 + 1`.
const CODE: [u8; 5] = [0xb0, 0x31, 0xe6, 0xf4, 0xf4];
const EXPECTED_STATUS: i32 = 0x31 * 2 + 1;
/// A probe takes a fraction of a second where it works.
const PROBE_WITHIN: Duration = Duration::from_secs(20);
/// Between two looks whether it ended.
const PROBE_POLL: Duration = Duration::from_millis(10);

/// Chooses what runs guests faster, and says why.
///
/// # Errors
/// QEMU is missing, or not even software emulation runs.
pub fn choose() -> Result<(Accel, String)> {
    let Some(tcg) = probe(Accel::Tcg)? else {
        bail!("QEMU does not run a machine of five instructions; is qemu-system-x86 whole?");
    };
    if !std::path::Path::new("/dev/kvm").exists() {
        return Ok((Accel::Tcg, "this machine has no /dev/kvm".into()));
    }
    Ok(match probe(Accel::Kvm)? {
        None => (Accel::Tcg, "/dev/kvm is there but runs no machine".into()),
        // Most of the probe is the BIOS, which real KVM runs several times faster than software.
        Some(kvm) if kvm > tcg => (
            Accel::Tcg,
            format!(
                "KVM takes {} ms where software takes {} ms",
                kvm.as_millis(),
                tcg.as_millis()
            ),
        ),
        Some(kvm) => (
            Accel::Kvm,
            format!("KVM takes {} ms, software {} ms", kvm.as_millis(), tcg.as_millis()),
        ),
    })
}

/// How long a machine takes to execute the probe; `None` if it does not.
fn probe(accel: Accel) -> Result<Option<Duration>> {
    let folder = tempfile::tempdir().context("cannot make a temporary folder")?;
    let disk = folder.path().join("probe.raw");
    let mut sector = [0; 512];
    sector[..CODE.len()].copy_from_slice(&CODE);
    sector[510..].copy_from_slice(&[0x55, 0xaa]);
    fs::write(&disk, sector).with_context(|| format!("cannot write {}", disk.display()))?;
    let began = Instant::now();
    let mut child = Command::new("qemu-system-x86_64")
        .args([
            "-accel",
            accel.name(),
            "-m",
            "16",
            "-display",
            "none",
            "-serial",
            "none",
            "-monitor",
            "none",
        ])
        .args([
            "-nodefaults",
            "-no-reboot",
            "-device",
            "isa-debug-exit,iobase=0xf4,iosize=1",
        ])
        .arg("-drive")
        .arg(format!("file={},format=raw,if=ide", disk.display()))
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .context("cannot start qemu-system-x86_64; install qemu-system-x86")?;
    loop {
        if let Some(status) = child.try_wait().context("cannot wait for QEMU")? {
            return Ok((status.code() == Some(EXPECTED_STATUS)).then(|| began.elapsed()));
        }
        if began.elapsed() > PROBE_WITHIN {
            child.kill().context("cannot end QEMU")?;
            child.wait().context("cannot wait for QEMU")?;
            return Ok(None);
        }
        std::thread::sleep(PROBE_POLL);
    }
}
