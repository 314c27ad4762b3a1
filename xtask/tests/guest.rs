//! A golden image is built, boots by itself in a real machine, and its workload notices what it should. Needs QEMU and,
//! for the first build, a mirror; says SKIP without.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::process::Command;
use std::time::Duration;

use xtask::guest::{Guest, GuestDisk, GuestOptions, Phase, build_golden, choose};
use xtask::workspace::Workspace;

/// Software emulation on a busy machine takes its time.
const BOOT_WITHIN: Duration = Duration::from_secs(300);
const PHASE_WITHIN: Duration = Duration::from_secs(120);

fn runs() -> bool {
    let missing = ["qemu-system-x86_64", "dpkg-deb", "apt-get"]
        .into_iter()
        .find(|tool| Command::new(tool).arg("--version").output().is_err());
    let Some(tool) = missing else { return true };
    assert!(
        std::env::var("REQUIRE_E2E").as_deref() != Ok("1"),
        "must run, but {tool} is not installed"
    );
    println!("SKIP: {tool} is not installed");
    false
}

#[test]
fn a_guest_boots_from_the_golden_image_and_sees_every_wrong_byte() {
    if !runs() {
        return;
    }
    let golden = build_golden(&Workspace::find().unwrap().cache).unwrap();
    let (accel, why) = choose().unwrap();
    println!("{}: {why}", accel.name());
    let folder = tempfile::tempdir().unwrap();
    let disk = folder.path().join("disk.raw");
    std::fs::copy(&golden, &disk).unwrap();
    let options = GuestOptions {
        name: "guest-1".into(),
        disk: GuestDisk::File(disk.clone()),
        accel,
        memory_mib: 160,
        console_log: folder.path().join("console.log"),
        qmp_sockets: Vec::new(),
        incoming: false,
    };

    let mut guest = Guest::boot(&options).unwrap();
    let ready = guest.wait_ready(BOOT_WITHIN).unwrap();
    println!("{ready:?} after {} ms", guest.age().as_millis());
    let phase = Phase {
        name: "first".into(),
        seconds: 2.0,
        depth: 4,
        write_permille: 300,
        ..Phase::default()
    };
    guest.start_phase(&phase).unwrap();
    let first = guest.finish_phase(PHASE_WITHIN).unwrap();
    println!("{first:?}");
    assert_eq!((first.name.as_str(), first.errors, first.corrupt), ("first", 0, 0));
    assert!(first.reads > 0 && first.writes > 0 && first.read_p99_us >= first.read_p50_us);
    guest.stop(PHASE_WITHIN).unwrap();

    // What was written is on the disk, and the file system is clean.
    let partition = folder.path().join("partition.raw");
    let image = format!("if={}", disk.display());
    let to = format!("of={}", partition.display());
    let run = |program: &str, args: &[&str]| {
        let output = Command::new(program).args(args).output().unwrap();
        assert!(output.status.success(), "{program} {args:?}: {output:?}");
    };
    run("dd", &[&image, &to, "bs=1M", "skip=1", "conv=sparse"]);
    run("/sbin/fsck.ext4", &["-f", "-n", partition.to_str().unwrap()]);

    // A second boot of the same disk does not know the counts of the first, so every page written then is a wrong one
    // now: the check is real.
    let mut guest = Guest::boot(&options).unwrap();
    guest.wait_ready(BOOT_WITHIN).unwrap();
    guest
        .start_phase(&Phase {
            write_permille: 0,
            ..phase
        })
        .unwrap();
    let second = guest.finish_phase(PHASE_WITHIN).unwrap();
    assert!(
        second.corrupt > 0 && second.first_failure.contains("does not hold its write"),
        "{second:?}"
    );
    guest.stop(PHASE_WITHIN).unwrap();
}

#[test]
fn a_disk_that_does_not_boot_is_reported_with_the_console() {
    if !runs() {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let disk = folder.path().join("disk.raw");
    // The same five instructions as the probe's, at the end of which the machine stands still.
    let file = File::create(&disk).unwrap();
    file.set_len(1 << 20).unwrap();
    file.write_all_at(&[0x55, 0xaa], 510).unwrap();
    let mut guest = Guest::boot(&GuestOptions {
        name: "guest-2".into(),
        disk: GuestDisk::File(disk),
        accel: xtask::guest::Accel::Tcg,
        memory_mib: 32,
        console_log: folder.path().join("console.log"),
        qmp_sockets: Vec::new(),
        incoming: false,
    })
    .unwrap();
    let error = guest.wait_ready(Duration::from_millis(1500)).unwrap_err().to_string();
    assert!(
        error.contains("guest guest-2 did not say HEARTH-GUEST-READY"),
        "{error}"
    );
}
