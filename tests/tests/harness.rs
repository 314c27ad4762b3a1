//! The tools of the end-to-end tests, tried on stock servers: a harness that sees no errors proves nothing unless it
//! sees one when there is one.

use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use hearth_tests::load::Load;
use xtask::cluster::{Host, Nats};
use xtask::wait;
use xtask::workspace::Workspace;

const WITHIN: Duration = Duration::from_secs(30);

/// A `qemu-nbd` that is killed when dropped.
struct QemuNbd(Child);

impl QemuNbd {
    fn start(socket: &Path, file: &Path) -> Result<Self> {
        let child = Command::new("qemu-nbd")
            .args(["-f", "raw", "-t", "-x", "disk", "-k"])
            .args([socket, file])
            .stdin(Stdio::null())
            .spawn()
            .context("cannot start qemu-nbd")?;
        Ok(Self(child))
    }
}

impl Drop for QemuNbd {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
fn load_waits_for_a_restarted_server_and_notices_lost_writes() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let (socket, file) = (dir.path().join("nbd.sock"), dir.path().join("disk"));
    let size = 1u64 << 20;
    std::fs::File::create(&file)?.set_len(size)?;
    let server = QemuNbd::start(&socket, &file)?;
    wait::until("qemu-nbd to listen", WITHIN, || Ok(socket.exists().then_some(())))?;
    let mut load = Load::start(&socket, "disk", size)?;
    wait::until("requests", WITHIN, || {
        load.check()?;
        Ok((load.done() > 50).then_some(()))
    })?;

    drop(server);
    std::fs::remove_file(&socket)?;
    let server = QemuNbd::start(&socket, &file)?;
    let before = load.done();
    wait::until("requests after a restart", WITHIN, || {
        Ok((load.done() > before + 50).then_some(()))
    })?;
    load.check().context("the load saw the restart")?;

    // Lose everything that was written: the load must notice.
    drop(server);
    std::fs::remove_file(&socket)?;
    std::fs::write(&file, vec![0xee; usize::try_from(size)?])?;
    let _server = QemuNbd::start(&socket, &file)?;
    let error = wait::until("the load to notice lost writes", WITHIN, || Ok(load.check().err()))?;
    ensure!(format!("{error:#}").contains("verification failed"), "{error:#}");
    Ok(())
}

#[test]
fn nats_server_comes_back_on_its_port() -> Result<()> {
    let workspace = Workspace::find()?;
    let Some(program) = hearth_tests::or_skip(xtask::setup::nats_server(&workspace)) else {
        return Ok(());
    };
    let dir = tempfile::tempdir()?;
    let mut nats = Nats::start(&program, dir.path(), &Host::default())?;
    let (url, pid) = (nats.url(), nats.daemon().pid());
    nats.crash_and_restart()?;
    ensure!(nats.url() == url, "was on {url}, is on {}", nats.url());
    ensure!(nats.daemon().pid() != pid);
    nats.daemon().check_running()
}
