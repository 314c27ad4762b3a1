//! The log in memory, for tests. Clones share it, so that a restart can be played.

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard};

use hearth_protocol::{Seq, WallMs};

use super::index::{self, Group, HEAT};
use super::{Entry, EventLog, Head, Index, LogError, Record};

/// A log in memory.
#[derive(Debug, Clone, Default)]
pub struct MemoryLog {
    held: Arc<Mutex<Held>>,
}

#[derive(Debug, Default)]
struct Held {
    identity: Option<String>,
    head: Head,
    records: BTreeMap<Seq, Vec<u8>>,
    indexes: BTreeSet<(Group, Vec<u8>)>,
    thinned: Seq,
    snapshots: BTreeMap<Seq, Vec<u8>>,
}

fn dir() -> PathBuf {
    PathBuf::from("(memory)")
}

impl MemoryLog {
    fn held(&self) -> MutexGuard<'_, Held> {
        self.held.lock().expect("no panic happens under this lock")
    }

    /// Changes the stored bytes of one record, or removes it with `None`: damage for tests.
    pub fn damage(&self, seq: Seq, change: impl FnOnce(Vec<u8>) -> Option<Vec<u8>>) {
        let mut held = self.held();
        if let Some(changed) = held.records.remove(&seq).and_then(change) {
            held.records.insert(seq, changed);
        }
    }
}

impl EventLog for MemoryLog {
    fn head(&self) -> Head {
        self.held().head.clone()
    }

    fn damage_at(&self, seq: Seq, why: String) -> LogError {
        LogError::Damaged { dir: dir(), seq, why }
    }

    fn bind(&mut self, identity: &str) -> Result<(), LogError> {
        let mut held = self.held();
        let ours = held.identity.get_or_insert_with(|| identity.into()).clone();
        if ours == identity {
            return Ok(());
        }
        Err(LogError::OtherStream {
            dir: dir(),
            ours,
            theirs: identity.into(),
        })
    }

    fn append(&mut self, entries: &[Entry]) -> Result<(), LogError> {
        let mut held = self.held();
        let mut head = held.head.clone();
        for entry in entries {
            if entry.seq != head.seq.next() {
                return Err(LogError::NotNext {
                    expected: head.seq.next(),
                    found: entry.seq,
                });
            }
            head = entry.after(&head);
            held.records.insert(entry.seq, entry.encode(&head.chain));
            if let Some((envelope, event)) = &entry.event {
                held.indexes.extend(index::keys(entry.seq, envelope, event));
            }
        }
        held.head = head;
        Ok(())
    }

    fn get(&self, seq: Seq) -> Result<Option<Record>, LogError> {
        self.held()
            .records
            .get(&seq)
            .map(|value| Record::decode(seq, value).map_err(|why| self.damage_at(seq, why)))
            .transpose()
    }

    fn scan(&self, from: Seq, each: &mut dyn FnMut(Record) -> bool) -> Result<(), LogError> {
        let seqs: Vec<Seq> = self.held().records.range(from..).map(|(seq, _)| *seq).collect();
        let mut expected = from.max(Seq(1));
        for seq in seqs {
            if seq != expected {
                return Err(self.damage_at(expected, format!("the record is missing, the next one is {seq}")));
            }
            expected = seq.next();
            let Some(record) = self.get(seq)? else { break };
            if !each(record) {
                break;
            }
        }
        Ok(())
    }

    fn thin(&mut self, through: Seq, max: usize) -> Result<usize, LogError> {
        let seqs = self.find(&Index::Kind(HEAT.into()), self.thinned()?.next(), max)?;
        // More may follow before `through` only when as many as were asked for stand before it.
        let more = seqs.len() == max && seqs.last().is_some_and(|last| *last <= through);
        let seqs: Vec<Seq> = seqs.into_iter().filter(|seq| *seq <= through).collect();
        for seq in &seqs {
            let record = self.get(*seq)?.expect("what is indexed is there");
            self.held().records.insert(*seq, record.thin().encode());
        }
        let done = if more {
            seqs.last().copied().unwrap_or(through)
        } else {
            through
        };
        let mut held = self.held();
        held.thinned = held.thinned.max(done);
        Ok(seqs.len())
    }

    fn thinned(&self) -> Result<Seq, LogError> {
        Ok(self.held().thinned)
    }

    fn put_snapshot(&mut self, at: Seq, bytes: &[u8]) -> Result<(), LogError> {
        self.held().snapshots.insert(at, bytes.to_vec());
        Ok(())
    }

    fn snapshots(&self) -> Result<Vec<Seq>, LogError> {
        Ok(self.held().snapshots.keys().copied().collect())
    }

    fn snapshot(&self, at: Seq) -> Result<Option<Vec<u8>>, LogError> {
        Ok(self.held().snapshots.get(&at).cloned())
    }

    fn drop_snapshot(&mut self, at: Seq) -> Result<(), LogError> {
        self.held().snapshots.remove(&at);
        Ok(())
    }

    fn find(&self, index: &Index, from: Seq, max: usize) -> Result<Vec<Seq>, LogError> {
        let (group, prefix) = (index.group(), index.prefix());
        Ok(self
            .held()
            .indexes
            .range((group, index.key(from))..)
            .take_while(|(g, key)| *g == group && key.starts_with(&prefix))
            .filter_map(|(_, key)| index::seq_of(key))
            .take(max)
            .collect())
    }

    fn seq_at_time(&self, time: WallMs) -> Result<Option<Seq>, LogError> {
        let last = (Group::Time, index::time_key(time, Seq(u64::MAX)));
        let held = self.held();
        let found = held.indexes.range(..=last).next_back();
        Ok(found
            .filter(|(group, _)| *group == Group::Time)
            .and_then(|(_, key)| index::seq_of(key)))
    }
}
