//! Bytes that several hold at a time: a client's, on their way to this node's disk and to other nodes, without a copy.

use std::fmt;
use std::ops::Deref;
use std::sync::Arc;

/// What holds them.
type Holder = dyn Deref<Target = [u8]> + Send + Sync;

/// See the module.
#[derive(Clone, Default)]
pub struct Shared(Option<Arc<Holder>>);

impl Shared {
    /// The bytes that something holds.
    pub fn of(holder: impl Deref<Target = [u8]> + Send + Sync + 'static) -> Self {
        Self(Some(Arc::new(holder)))
    }
}

impl Deref for Shared {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        self.0.as_ref().map_or(&[], |holder| holder)
    }
}

impl fmt::Debug for Shared {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} bytes", self.len())
    }
}

impl PartialEq for Shared {
    fn eq(&self, other: &Self) -> bool {
        **self == **other
    }
}

impl Eq for Shared {}

impl From<Vec<u8>> for Shared {
    fn from(bytes: Vec<u8>) -> Self {
        Self::of(bytes)
    }
}
