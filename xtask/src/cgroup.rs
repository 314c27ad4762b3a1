//! A control group of our own, in whichever hierarchy this machine has; gone when dropped.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};

use anyhow::{Context, Result, bail};

use crate::step::note;

const ROOT: &str = "/sys/fs/cgroup";

/// Groups of one process have names of their own.
static MADE: AtomicU32 = AtomicU32::new(0);

/// A control group; processes that are still in it when it is dropped go back to its parent.
#[derive(Debug)]
pub struct ControlGroup {
    dir: PathBuf,
    unified: bool,
}

impl ControlGroup {
    /// Makes a group under a controller, which has one name as a hierarchy of its own (`blkio`) and one in the
    /// unified hierarchy (`io`).
    ///
    /// # Errors
    /// There is no such controller that we may use; the text names it.
    pub fn new(own_name: &str, unified_name: &str) -> Result<Self> {
        let (root, unified) = controller(own_name, unified_name)?;
        let number = MADE.fetch_add(1, Ordering::SeqCst);
        let dir = root.join(format!("hearth-{}-{number}", std::process::id()));
        fs::create_dir_all(&dir).with_context(|| format!("cannot make the control group {}", dir.display()))?;
        Ok(Self { dir, unified })
    }

    /// Its folder.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Whether it is in the unified hierarchy, whose files have other names.
    pub fn is_unified(&self) -> bool {
        self.unified
    }

    /// Puts a process with all its threads into it.
    ///
    /// # Errors
    /// It has ended.
    pub fn add(&self, pid: u32) -> Result<()> {
        self.write("cgroup.procs", &pid.to_string())
    }

    /// Reads one of its files.
    ///
    /// # Errors
    /// There is no such file, or the group is gone.
    pub fn read(&self, file: &str) -> Result<String> {
        let path = self.dir.join(file);
        fs::read_to_string(&path).with_context(|| format!("cannot read {}", path.display()))
    }

    /// Writes one of its files.
    ///
    /// # Errors
    /// There is no such file, or the kernel refuses the value.
    pub fn write(&self, file: &str, value: &str) -> Result<()> {
        let path = self.dir.join(file);
        fs::write(&path, value).with_context(|| format!("cannot write {value:?} to {}", path.display()))
    }
}

impl Drop for ControlGroup {
    fn drop(&mut self) {
        // A group with a process in it cannot be removed: what still runs goes back to the parent.
        let still = self.read("cgroup.procs").unwrap_or_default();
        for pid in still.lines() {
            if let Some(parent) = self.dir.parent() {
                // A process that ended meanwhile is out as well.
                let _ = fs::write(parent.join("cgroup.procs"), pid);
            }
        }
        if let Err(error) = fs::remove_dir(&self.dir) {
            note(format!("left behind: {}: {error}", self.dir.display()));
        }
    }
}

/// The controller's root, and whether it is the unified hierarchy.
fn controller(own_name: &str, unified_name: &str) -> Result<(PathBuf, bool)> {
    let own = Path::new(ROOT).join(own_name);
    if own.join("cgroup.procs").exists() {
        return Ok((own, false));
    }
    let controllers = fs::read_to_string(Path::new(ROOT).join("cgroup.subtree_control")).unwrap_or_default();
    if controllers.split_whitespace().any(|name| name == unified_name) {
        return Ok((ROOT.into(), true));
    }
    bail!("there is no {own_name} controller in {ROOT}, and no {unified_name} in its cgroup.subtree_control")
}
