//! qcow2, as far as a file needs it that is written once from start to end: version 3, no backing file, no
//! compression, one reference to every cluster.
//!
//! Layout: header, L1 table, then data clusters and L2 tables as they come, then the reference counts. Format:
//! docs/interop/qcow2.txt of QEMU.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use super::CLUSTER;

const CLUSTER_BITS: u32 = CLUSTER.trailing_zeros();

/// Entries of an L2 table, one cluster of 8-byte offsets.
const L2_ENTRIES: u64 = CLUSTER as u64 / 8;

/// Reference counts of 16 bits in one cluster.
const COUNTS: u64 = CLUSTER as u64 / 2;

/// The cluster has exactly one reference, so a writer may write it in place.
const COPIED: u64 = 1 << 63;

const HEADER_BYTES: u32 = 104;

/// A file that is being written.
#[derive(Debug)]
pub(super) struct Qcow2 {
    file: File,
    size: u64,
    /// Offset of each L2 table, 0 where there is none.
    l1: Vec<u64>,
    /// The table in use: its number and its entries.
    l2: Option<(u64, Vec<u64>)>,
    /// Clusters of the file in use.
    clusters: u64,
}

impl Qcow2 {
    /// A disk of zeros. Nothing is written yet.
    pub fn new(file: File, size: u64) -> Self {
        let tables = size.div_ceil(L2_ENTRIES * CLUSTER as u64);
        Self {
            file,
            size,
            l1: vec![0; tables as usize],
            l2: None,
            clusters: 1 + clusters_of(tables * 8),
        }
    }

    fn take(&mut self) -> u64 {
        self.clusters += 1;
        (self.clusters - 1) * CLUSTER as u64
    }

    pub fn write(&mut self, offset: u64, cluster: &[u8]) -> io::Result<()> {
        let number = offset / CLUSTER as u64;
        let table = number / L2_ENTRIES;
        if self.l2.as_ref().is_none_or(|(current, _)| *current != table) {
            self.put_l2()?;
            self.l1[table as usize] = self.take();
            self.l2 = Some((table, vec![0; L2_ENTRIES as usize]));
        }
        let at = self.take();
        self.file.write_all_at(cluster, at)?;
        if let Some((_, entries)) = &mut self.l2 {
            entries[(number % L2_ENTRIES) as usize] = at | COPIED;
        }
        Ok(())
    }

    fn put_l2(&mut self) -> io::Result<()> {
        match self.l2.take() {
            Some((table, entries)) => self.file.write_all_at(&big_endian(&entries), self.l1[table as usize]),
            None => Ok(()),
        }
    }

    /// Writes what holds the data together; returns the complete file.
    pub fn finish(&mut self) -> io::Result<&mut File> {
        self.put_l2()?;
        let l1: Vec<u64> = self
            .l1
            .iter()
            .map(|at| if *at == 0 { 0 } else { at | COPIED })
            .collect();
        self.file.write_all_at(&big_endian(&l1), CLUSTER as u64)?;

        // The counts count their own clusters too.
        let used = self.clusters;
        let (mut blocks, mut tables) = (0, 0);
        loop {
            let all = used + blocks + tables;
            let next = (all.div_ceil(COUNTS), clusters_of(all.div_ceil(COUNTS) * 8));
            if next == (blocks, tables) {
                break;
            }
            (blocks, tables) = next;
        }
        let all = used + blocks + tables;
        let table_at = used * CLUSTER as u64;
        let first_block = used + tables;
        let offsets: Vec<u64> = (first_block..first_block + blocks)
            .map(|cluster| cluster * CLUSTER as u64)
            .collect();
        self.file.write_all_at(&big_endian(&offsets), table_at)?;
        for (i, at) in offsets.iter().enumerate() {
            let ones = (all - i as u64 * COUNTS).min(COUNTS) as usize;
            self.file.write_all_at(&[0, 1].repeat(ones), *at)?;
        }
        self.file.write_all_at(&self.header(table_at, tables), 0)?;
        self.file.set_len(all * CLUSTER as u64)?;
        Ok(&mut self.file)
    }

    fn header(&self, counts_at: u64, counts_clusters: u64) -> Vec<u8> {
        let mut header = b"QFI\xfb".to_vec();
        let mut word = |value: u32| header.extend_from_slice(&value.to_be_bytes());
        let half = |value: u64| [(value >> 32) as u32, value as u32];
        word(3);
        // No backing file: its offset and the length of its name.
        (0..3).for_each(|_| word(0));
        word(CLUSTER_BITS);
        half(self.size).into_iter().for_each(&mut word);
        // Not encrypted.
        word(0);
        word(self.l1.len() as u32);
        half(CLUSTER as u64).into_iter().for_each(&mut word);
        half(counts_at).into_iter().for_each(&mut word);
        word(counts_clusters as u32);
        // No snapshots: their count and offset. No incompatible, compatible or autoclear features.
        (0..9).for_each(|_| word(0));
        // Reference counts of 2^4 bits.
        word(4);
        word(HEADER_BYTES);
        header
    }
}

fn clusters_of(bytes: u64) -> u64 {
    bytes.div_ceil(CLUSTER as u64)
}

fn big_endian(numbers: &[u64]) -> Vec<u8> {
    numbers.iter().flat_map(|number| number.to_be_bytes()).collect()
}
