//! Fills under way, so that readers who miss the same unit at once cause one read below instead of many.

use std::sync::{Condvar, Mutex};

const SHARDS: usize = 64;

/// The units being read.
pub struct InFlight {
    shards: Box<[(Mutex<Vec<u64>>, Condvar)]>,
}

/// The right to read a unit; others wait until it is dropped.
pub struct Lead<'a> {
    owner: &'a InFlight,
    key: u64,
    shard: usize,
}

impl InFlight {
    /// Nothing under way.
    pub fn new() -> Self {
        Self {
            shards: (0..SHARDS)
                .map(|_| (Mutex::new(Vec::with_capacity(16)), Condvar::new()))
                .collect(),
        }
    }

    /// Takes the lead for a unit, or waits until whoever has it is done and returns `None`: look again then.
    pub fn lead_or_wait(&self, key: u64, hash: u64) -> Option<Lead<'_>> {
        let shard = hash as usize % SHARDS;
        let (lock, done) = &self.shards[shard];
        let mut keys = lock.lock().expect("in-flight lock");
        if !keys.contains(&key) {
            keys.push(key);
            return Some(Lead {
                owner: self,
                key,
                shard,
            });
        }
        while keys.contains(&key) {
            keys = done.wait(keys).expect("in-flight lock");
        }
        None
    }

    /// Takes the lead if nobody has it.
    pub fn try_lead(&self, key: u64, hash: u64) -> Option<Lead<'_>> {
        let shard = hash as usize % SHARDS;
        let mut keys = self.shards[shard].0.lock().expect("in-flight lock");
        if keys.contains(&key) {
            return None;
        }
        keys.push(key);
        Some(Lead {
            owner: self,
            key,
            shard,
        })
    }
}

impl Drop for Lead<'_> {
    fn drop(&mut self) {
        let (lock, done) = &self.owner.shards[self.shard];
        let mut keys = lock.lock().expect("in-flight lock");
        if let Some(at) = keys.iter().position(|k| *k == self.key) {
            keys.swap_remove(at);
        }
        done.notify_all();
    }
}
