//! A memory limit that the kernel holds processes to, and its account of what they took.

use std::path::Path;

use anyhow::{Context, Result};
use xtask::cgroup::ControlGroup;

/// A control group with a memory limit; removed when dropped.
#[derive(Debug)]
pub struct MemoryLimit(ControlGroup);

/// The kernel's account of a [`MemoryLimit`] since it was made.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MemoryUse {
    /// The most that was ever taken, page cache and kernel memory included.
    pub peak_bytes: u64,
    /// How often the limit was hit.
    pub limit_hits: u64,
    /// Processes killed at the limit.
    pub oom_kills: u64,
}

impl MemoryLimit {
    /// Makes a group that may take `bytes`.
    ///
    /// # Errors
    /// There is no memory controller that we may use.
    pub fn new(bytes: u64) -> Result<Self> {
        let group = ControlGroup::new("memory", "memory")?;
        let file = if group.is_unified() {
            "memory.max"
        } else {
            "memory.limit_in_bytes"
        };
        group.write(file, &bytes.to_string())?;
        Ok(Self(group))
    }

    /// The group's folder: processes that start in it are counted whole.
    pub fn group(&self) -> &Path {
        self.0.dir()
    }

    /// What was taken so far.
    ///
    /// # Errors
    /// The group is gone, or its files read otherwise than the kernel documents.
    pub fn used(&self) -> Result<MemoryUse> {
        let (peak, hits, kills) = if self.0.is_unified() {
            ("memory.peak", "memory.events", "memory.events")
        } else {
            ("memory.max_usage_in_bytes", "memory.failcnt", "memory.oom_control")
        };
        let hits = self.0.read(hits)?;
        Ok(MemoryUse {
            peak_bytes: number(&self.0.read(peak)?)?,
            limit_hits: if self.0.is_unified() {
                keyed(&hits, "max")?
            } else {
                number(&hits)?
            },
            oom_kills: keyed(&self.0.read(kills)?, "oom_kill")?,
        })
    }
}

fn number(text: &str) -> Result<u64> {
    let text = text.trim();
    text.parse()
        .with_context(|| format!("{text:?} of a memory control group is no number"))
}

/// The number behind a key, one pair to a line.
fn keyed(text: &str, key: &str) -> Result<u64> {
    let found = text.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix(' '));
    number(found.with_context(|| format!("a memory control group does not count {key}: {text:?}"))?)
}
