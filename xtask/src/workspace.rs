//! Where things are: the clone, the cache of tools and build output outside it, and commands that run with both.

use std::env;
use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};

/// The clone and the cache beside it.
#[derive(Debug, Clone)]
pub struct Workspace {
    /// Root of the clone.
    pub root: PathBuf,
    /// `$XDG_CACHE_HOME/hearth`: tools, build output, golden images. Deleting it costs time only.
    pub cache: PathBuf,
    /// `CARGO_TARGET_DIR`, or `target` in the cache: RocksDB's C++ takes minutes, so clones share it.
    pub target: PathBuf,
}

impl Workspace {
    /// Finds the clone that this program is run in. Cargo names it: of two clones that share their build output, one may
    /// be given the program that the other one built.
    ///
    /// # Errors
    /// Neither `XDG_CACHE_HOME` nor `HOME` is set.
    pub fn find() -> Result<Self> {
        let run_in = env::var_os("CARGO_MANIFEST_DIR").map(PathBuf::from);
        let root = run_in
            .filter(|dir| dir.ends_with("xtask"))
            .unwrap_or_else(|| env!("CARGO_MANIFEST_DIR").into())
            .parent()
            .context("xtask's folder has no parent; run it from a clone of the repository")?
            .to_owned();
        let cache = env::var_os("XDG_CACHE_HOME")
            .filter(|dir| !dir.is_empty())
            .map(PathBuf::from)
            .or_else(|| env::var_os("HOME").map(|home| Path::new(&home).join(".cache")))
            .context("neither XDG_CACHE_HOME nor HOME is set; set one, tools and build output go there")?
            .join("hearth");
        let target = env::var_os("CARGO_TARGET_DIR").map_or_else(|| cache.join("target"), PathBuf::from);
        Ok(Self { root, cache, target })
    }

    /// Folder of tools that set-up installs.
    pub fn tools(&self) -> PathBuf {
        self.cache.join("tools")
    }

    /// Folder of Hearth's own programs, built with the one profile that everything here uses.
    pub fn bin_dir(&self) -> PathBuf {
        self.target.join("debug")
    }

    /// A command that runs in the clone, finds the installed tools, and builds into the shared target folder.
    pub fn command(&self, program: impl AsRef<OsStr>) -> Command {
        let mut command = Command::new(program);
        command
            .current_dir(&self.root)
            .env("PATH", self.path_variable())
            .env("CARGO_TARGET_DIR", &self.target);
        command
    }

    /// The first file of that name in the tools folders or on `PATH`.
    pub fn find_program(&self, name: &str) -> Option<PathBuf> {
        env::split_paths(&self.path_variable())
            // Debian keeps mkfs and losetup where a user's PATH does not look.
            .chain(["/usr/sbin".into(), "/sbin".into()])
            .map(|dir| dir.join(name))
            .find(|path| path.is_file())
    }

    fn path_variable(&self) -> std::ffi::OsString {
        let cargo_home = env::var_os("CARGO_HOME")
            .map(PathBuf::from)
            .or_else(|| Some(Path::new(&env::var_os("HOME")?).join(".cargo")));
        let own = [Some(self.tools()), cargo_home.map(|home| home.join("bin"))]
            .into_iter()
            .flatten();
        let inherited = env::var_os("PATH").unwrap_or_default();
        env::join_paths(own.chain(env::split_paths(&inherited))).unwrap_or(inherited)
    }
}
