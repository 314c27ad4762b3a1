//! A real guest on the kernel device, over deaths of the daemon.

use std::path::Path;
use std::process::Command;
use std::time::Duration;

use xtask::guest::{Guest, GuestDisk, GuestOptions, Phase, build_golden, choose};
use xtask::workspace::Workspace;

use super::restart::Daemon;
use super::{run, runs};

/// Software emulation on a busy machine takes its time.
const BOOT_WITHIN: Duration = Duration::from_secs(300);
const PHASE_WITHIN: Duration = Duration::from_secs(120);
/// Deaths of the daemon while the guest works.
const DEATHS: usize = 5;

fn golden(into: &Path) -> bool {
    let built = build_golden(&Workspace::find().unwrap().cache);
    match built.and_then(|golden| Ok(std::fs::copy(golden, into)?)) {
        Ok(_) => true,
        Err(why) => {
            assert!(
                std::env::var("REQUIRE_E2E").as_deref() != Ok("1"),
                "must run, but: {why:#}"
            );
            println!("SKIP: no golden image: {why:#}");
            false
        }
    }
}

#[test]
fn a_guest_on_the_device_sees_no_error_while_the_daemon_dies_again_and_again() {
    let folder = tempfile::tempdir().unwrap();
    if !runs(&["qemu-system-x86_64", "/sbin/losetup"]) || !golden(&folder.path().join("disk")) {
        return;
    }
    let mut daemon = Daemon::start(folder.path(), true);
    if !daemon.survives {
        println!("SKIP: this kernel cannot send FUSE requests again");
        return daemon.finish();
    }
    let mut guest = Guest::boot(&GuestOptions {
        name: "on-device".into(),
        disk: GuestDisk::Device(daemon.node.clone()),
        accel: choose().unwrap().0,
        memory_mib: 160,
        console_log: folder.path().join("console.log"),
        qmp_sockets: Vec::new(),
        incoming: false,
    })
    .unwrap();
    // The firmware, the boot loader and the kernel are on the device too.
    daemon.kill();
    daemon = Daemon::start(folder.path(), true);
    println!("{:?}", guest.wait_ready(BOOT_WITHIN).unwrap());
    for death in 0..DEATHS {
        let phase = Phase {
            name: format!("death-{death}"),
            seconds: 2.0,
            depth: 4,
            write_permille: 500,
            ..Phase::default()
        };
        guest.start_phase(&phase).unwrap();
        daemon.kill();
        daemon = Daemon::start(folder.path(), true);
        assert_eq!(daemon.waiting, 1);
        let result = guest.finish_phase(PHASE_WITHIN).unwrap();
        println!("{result:?}");
        assert_eq!((result.errors, result.corrupt), (0, 0), "{}", result.first_failure);
        assert!(result.reads > 0 && result.writes > 0);
    }
    guest.stop(PHASE_WITHIN).unwrap();

    let offset = (1u64 << 20).to_string();
    let partition = run(
        "/sbin/losetup",
        &["--find", "--show", "--offset", &offset, daemon.node.to_str().unwrap()],
    );
    let checked = Command::new("/sbin/fsck.ext4")
        .args(["-f", "-n", partition.trim()])
        .output()
        .unwrap();
    run("/sbin/losetup", &["--detach", partition.trim()]);
    assert!(checked.status.success(), "{checked:?}");
    daemon.finish();
}
