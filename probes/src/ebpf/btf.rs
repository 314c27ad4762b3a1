//! Reads structure layouts from the kernel's own type data (BTF), as far as field offsets need it.
//!
//! Format: `Documentation/bpf/btf.rst` of the kernel. Only what leads from a tracepoint to the fields of its arguments
//! is understood; every other kind of type is stepped over.

use std::collections::HashMap;

/// Why a layout cannot be read.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum BtfError {
    /// The bytes are not BTF of a known form.
    #[error("the kernel's type data is damaged or of an unknown form at byte {0}")]
    Damaged(usize),
    /// The kernel has no such tracepoint, or the argument is another one.
    #[error("the kernel's tracepoint {tracepoint} has no argument {argument} of type struct {name} *")]
    Argument {
        /// Which tracepoint.
        tracepoint: String,
        /// Which argument, from 0.
        argument: usize,
        /// What it must point to.
        name: String,
    },
    /// A structure has no such field, or it has another size.
    #[error("the kernel's struct {name} has no {size}-byte field {field}")]
    Field {
        /// Which structure.
        name: String,
        /// Which field.
        field: String,
        /// Size the field must have.
        size: u32,
    },
}

const INT: u32 = 1;
const PTR: u32 = 2;
const ARRAY: u32 = 3;
const STRUCT: u32 = 4;
const UNION: u32 = 5;
const ENUM: u32 = 6;
const TYPEDEF: u32 = 8;
const VOLATILE: u32 = 9;
const CONST: u32 = 10;
const RESTRICT: u32 = 11;
const FUNC_PROTO: u32 = 13;
const VAR: u32 = 14;
const DATASEC: u32 = 15;
const FLOAT: u32 = 16;
const DECL_TAG: u32 = 17;
const TYPE_TAG: u32 = 18;
const ENUM64: u32 = 19;

const HEADER_BYTES: usize = 24;
const TYPE_BYTES: usize = 12;

/// Anonymous structures within each other; damaged data may name one within itself.
const ANONYMOUS_DEPTH_MAX: u32 = 16;

/// A type's id: its place in the type section, from 1; 0 is `void`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct TypeId(u32);

/// One type: where its fixed part is, and what the fixed part says.
#[derive(Debug, Clone, Copy)]
struct Type {
    /// Place of what follows the fixed part.
    tail: usize,
    name: u32,
    kind: u32,
    entries: usize,
    bitfields: bool,
    size_or_type: u32,
}

/// Type data of a kernel.
pub struct Btf {
    bytes: Vec<u8>,
    strings: usize,
    types: Vec<Type>,
    /// `btf_trace_*` typedefs by name.
    tracepoints: HashMap<String, TypeId>,
}

fn word(bytes: &[u8], at: usize) -> Result<u32, BtfError> {
    let raw = bytes.get(at..at.saturating_add(4)).ok_or(BtfError::Damaged(at))?;
    Ok(u32::from_ne_bytes(raw.try_into().expect("four bytes")))
}

impl Btf {
    /// Reads what `/sys/kernel/btf/vmlinux` holds.
    ///
    /// # Errors
    /// [`BtfError::Damaged`] if it is not BTF in this machine's byte order.
    pub fn parse(bytes: Vec<u8>) -> Result<Self, BtfError> {
        let magic_and_version = word(&bytes, 0)?;
        if magic_and_version & 0xffff != 0xeb9f {
            return Err(BtfError::Damaged(0));
        }
        let header = word(&bytes, 4)? as usize;
        if header < HEADER_BYTES {
            return Err(BtfError::Damaged(4));
        }
        let start = header.saturating_add(word(&bytes, 8)? as usize);
        let end = start.saturating_add(word(&bytes, 12)? as usize);
        let strings = header.saturating_add(word(&bytes, 16)? as usize);
        let mut btf = Self {
            bytes,
            strings,
            types: vec![Type {
                tail: 0,
                name: 0,
                kind: 0,
                entries: 0,
                bitfields: false,
                size_or_type: 0,
            }],
            tracepoints: HashMap::new(),
        };
        let mut at = start;
        while at < end {
            let info = word(&btf.bytes, at + 4)?;
            let found = Type {
                tail: at + TYPE_BYTES,
                name: word(&btf.bytes, at)?,
                kind: info >> 24 & 0x1f,
                entries: (info & 0xffff) as usize,
                bitfields: info >> 31 != 0,
                size_or_type: word(&btf.bytes, at + 8)?,
            };
            if found.kind == TYPEDEF && btf.name_at(found.name)?.starts_with(b"btf_trace_") {
                let name = String::from_utf8_lossy(btf.name_at(found.name)?).into_owned();
                btf.tracepoints.insert(name, TypeId(btf.types.len() as u32));
            }
            at = found.tail
                + match found.kind {
                    INT | VAR | DECL_TAG => 4,
                    ARRAY => 12,
                    STRUCT | UNION | DATASEC | ENUM64 => 12 * found.entries,
                    ENUM | FUNC_PROTO => 8 * found.entries,
                    kind if kind <= ENUM64 => 0,
                    _ => return Err(BtfError::Damaged(at)),
                };
            btf.types.push(found);
        }
        Ok(btf)
    }

    fn name_at(&self, offset: u32) -> Result<&[u8], BtfError> {
        let at = self.strings.saturating_add(offset as usize);
        let rest = self.bytes.get(at..).ok_or(BtfError::Damaged(at))?;
        Ok(rest.split(|byte| *byte == 0).next().unwrap_or_default())
    }

    fn get(&self, id: TypeId) -> Result<&Type, BtfError> {
        self.types.get(id.0 as usize).ok_or(BtfError::Damaged(0))
    }

    /// Follows typedefs and qualifiers.
    fn plain(&self, mut id: TypeId) -> Result<TypeId, BtfError> {
        // Bounded by the number of types: damaged data may hold a circle.
        for _ in 0..self.types.len() {
            let found = self.get(id)?;
            if !matches!(found.kind, TYPEDEF | VOLATILE | CONST | RESTRICT | TYPE_TAG) {
                return Ok(id);
            }
            id = TypeId(found.size_or_type);
        }
        Err(BtfError::Damaged(0))
    }

    fn size(&self, id: TypeId) -> Result<u32, BtfError> {
        let found = self.get(self.plain(id)?)?;
        Ok(match found.kind {
            PTR => size_of::<usize>() as u32,
            INT | STRUCT | UNION | ENUM | ENUM64 | FLOAT => found.size_or_type,
            _ => 0,
        })
    }

    /// The type that a pointer points to.
    fn pointee(&self, id: TypeId) -> Result<Option<TypeId>, BtfError> {
        let found = self.get(self.plain(id)?)?;
        match found.kind {
            PTR => self.plain(TypeId(found.size_or_type)).map(Some),
            _ => Ok(None),
        }
    }

    /// The structure that an argument of a tracepoint points to.
    ///
    /// # Errors
    /// [`BtfError::Argument`] if the kernel's tracepoint is another one.
    pub fn tracepoint_struct(&self, tracepoint: &str, argument: usize, name: &str) -> Result<TypeId, BtfError> {
        let found = || -> Result<Option<TypeId>, BtfError> {
            let Some(typedef) = self.tracepoints.get(&format!("btf_trace_{tracepoint}")) else {
                return Ok(None);
            };
            let Some(prototype) = self.pointee(*typedef)? else {
                return Ok(None);
            };
            let function = self.get(prototype)?;
            // The first parameter is the tracepoint's own.
            if function.kind != FUNC_PROTO || argument + 1 >= function.entries {
                return Ok(None);
            }
            let parameter = TypeId(word(&self.bytes, function.tail + 8 * (argument + 1) + 4)?);
            let Some(structure) = self.pointee(parameter)? else {
                return Ok(None);
            };
            Ok((self.name_at(self.get(structure)?.name)? == name.as_bytes()).then_some(structure))
        };
        found()?.ok_or_else(|| BtfError::Argument {
            tracepoint: tracepoint.into(),
            argument,
            name: name.into(),
        })
    }

    /// Offset in bytes and type of a field, which may lie in nested structures (`bi_iter.bi_size`) and in anonymous
    /// ones. It must have `size` bytes and be no bit field.
    ///
    /// # Errors
    /// [`BtfError::Field`] if there is none.
    pub fn field(&self, structure: TypeId, path: &str, size: u32) -> Result<(u32, TypeId), BtfError> {
        let mut at = (0, structure);
        for name in path.split('.') {
            match self.member(at.1, name.as_bytes(), 0)? {
                Some((bits, id)) if bits % 8 == 0 => at = (at.0 + bits / 8, id),
                _ => return Err(self.no_field(structure, path, size)),
            }
        }
        match self.size(at.1)? == size {
            true => Ok(at),
            false => Err(self.no_field(structure, path, size)),
        }
    }

    /// Offset of a pointer field, and the structure it points to.
    ///
    /// # Errors
    /// [`BtfError::Field`] if there is none.
    pub fn pointer(&self, structure: TypeId, path: &str) -> Result<(u32, TypeId), BtfError> {
        let size = size_of::<usize>() as u32;
        let (offset, id) = self.field(structure, path, size)?;
        let target = self.pointee(id)?.ok_or_else(|| self.no_field(structure, path, size))?;
        Ok((offset, target))
    }

    fn no_field(&self, structure: TypeId, path: &str, size: u32) -> BtfError {
        let name = self
            .get(structure)
            .and_then(|found| self.name_at(found.name))
            .unwrap_or(b"?");
        BtfError::Field {
            name: String::from_utf8_lossy(name).into_owned(),
            field: path.into(),
            size,
        }
    }

    /// Offset in bits and type of a member, searching anonymous members.
    fn member(&self, structure: TypeId, name: &[u8], depth: u32) -> Result<Option<(u32, TypeId)>, BtfError> {
        let found = *self.get(self.plain(structure)?)?;
        if !matches!(found.kind, STRUCT | UNION) || depth > ANONYMOUS_DEPTH_MAX {
            return Ok(None);
        }
        for entry in 0..found.entries {
            let at = found.tail + 12 * entry;
            let own = word(&self.bytes, at)?;
            let id = TypeId(word(&self.bytes, at + 4)?);
            let raw = word(&self.bytes, at + 8)?;
            let (bits, width) = if found.bitfields {
                (raw & 0xff_ffff, raw >> 24)
            } else {
                (raw, 0)
            };
            if own == 0 {
                if let Some((inner, id)) = self.member(id, name, depth + 1)? {
                    return Ok(Some((bits + inner, id)));
                }
            } else if self.name_at(own)? == name {
                return Ok((width == 0).then_some((bits, id)));
            }
        }
        Ok(None)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Builds type data the way a compiler writes it.
    #[derive(Default)]
    struct Builder {
        types: Vec<u32>,
        strings: Vec<u8>,
        count: u32,
    }

    impl Builder {
        fn name(&mut self, text: &str) -> u32 {
            if self.strings.is_empty() {
                self.strings.push(0);
            }
            if text.is_empty() {
                return 0;
            }
            let at = self.strings.len() as u32;
            self.strings.extend(text.as_bytes());
            self.strings.push(0);
            at
        }

        fn add(&mut self, kind: u32, name: &str, size_or_type: u32, entries: &[&[u32]]) -> u32 {
            let name = self.name(name);
            self.types
                .extend([name, kind << 24 | entries.len() as u32, size_or_type]);
            entries.iter().for_each(|entry| self.types.extend(*entry));
            self.count += 1;
            self.count
        }

        fn int(&mut self, size: u32) -> u32 {
            let id = self.add(INT, "int", size, &[]);
            self.types.push(size * 8);
            id
        }

        fn bytes(self) -> Vec<u8> {
            let types = self.types.len() as u32 * 4;
            let header = [0x1_eb9f, 24, 0, types, types, self.strings.len() as u32];
            header
                .iter()
                .chain(&self.types)
                .flat_map(|word| word.to_ne_bytes())
                .chain(self.strings)
                .collect()
        }
    }

    /// `struct bio { u64; union { struct iter { u64 sector; u32 size; } bi_iter; }; disk *bi_disk; }`
    fn sample() -> Vec<u8> {
        let mut b = Builder::default();
        let (u64_, u32_) = (b.int(8), b.int(4));
        let (sector, size) = (b.name("sector"), b.name("size"));
        let iter = b.add(STRUCT, "iter", 16, &[&[sector, u64_, 0], &[size, u32_, 64]]);
        let bi_iter = b.name("bi_iter");
        let anonymous = b.add(UNION, "", 16, &[&[bi_iter, iter, 0]]);
        let major = b.name("major");
        let disk = b.add(STRUCT, "disk", 4, &[&[major, u32_, 0]]);
        let alias = b.add(TYPEDEF, "disk_t", disk, &[]);
        let to_disk = b.add(PTR, "", alias, &[]);
        let (first, bi_disk) = (b.name("first"), b.name("bi_disk"));
        let members: &[&[u32]] = &[&[first, u64_, 0], &[0, anonymous, 64], &[bi_disk, to_disk, 192]];
        let bio = b.add(STRUCT, "bio", 32, members);
        let to_bio = b.add(PTR, "", bio, &[]);
        let prototype = b.add(FUNC_PROTO, "", 0, &[&[0, to_disk], &[0, to_bio]]);
        let to_prototype = b.add(PTR, "", prototype, &[]);
        b.add(TYPEDEF, "btf_trace_queue", to_prototype, &[]);
        b.bytes()
    }

    #[test]
    fn fields_are_found_through_nested_and_anonymous_structures() {
        let btf = Btf::parse(sample()).unwrap();
        let bio = btf.tracepoint_struct("queue", 0, "bio").unwrap();
        assert_eq!(btf.field(bio, "bi_iter.size", 4).unwrap().0, 16);
        let (offset, disk) = btf.pointer(bio, "bi_disk").unwrap();
        assert_eq!((offset, btf.field(disk, "major", 4).unwrap().0), (24, 0));
    }

    #[test]
    fn what_is_not_there_is_named() {
        let btf = Btf::parse(sample()).unwrap();
        let bio = btf.tracepoint_struct("queue", 0, "bio").unwrap();
        let text = btf.field(bio, "bi_iter.size", 8).unwrap_err().to_string();
        assert_eq!(text, "the kernel's struct bio has no 8-byte field bi_iter.size");
        for (tracepoint, argument, name) in [("none", 0, "bio"), ("queue", 1, "bio"), ("queue", 0, "request")] {
            let error = btf.tracepoint_struct(tracepoint, argument, name).unwrap_err();
            assert!(matches!(error, BtfError::Argument { .. }), "{error}");
        }
    }

    #[test]
    fn damaged_data_is_refused_and_never_panics() {
        let good = sample();
        for length in 0..good.len() {
            let _ = Btf::parse(good[..length].to_vec()).map(|btf| btf.tracepoint_struct("queue", 0, "bio"));
        }
        for at in 0..good.len() {
            let mut bad = good.clone();
            bad[at] ^= 0xff;
            if let Ok(btf) = Btf::parse(bad)
                && let Ok(bio) = btf.tracepoint_struct("queue", 0, "bio")
            {
                let _ = (btf.field(bio, "bi_iter.size", 4), btf.pointer(bio, "bi_disk"));
            }
        }
        assert_eq!(Btf::parse(vec![0; 64]).err(), Some(BtfError::Damaged(0)));
    }
}
