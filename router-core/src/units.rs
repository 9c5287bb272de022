//! Quantities as types: a bare integer in a public signature is a question the reader has to answer.

use std::fmt;
use std::iter::Sum;
use std::ops::{Add, AddAssign};

macro_rules! unit {
    ($(#[$doc:meta])* $name:ident, $suffix:literal) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub struct $name(pub u64);

        impl $name {
            /// None of it.
            pub const ZERO: Self = Self(0);

            /// The difference, or zero where `other` is larger.
            #[must_use]
            pub const fn saturating_sub(self, other: Self) -> Self {
                Self(self.0.saturating_sub(other.0))
            }

            /// The difference, or `None` where `other` is larger.
            pub const fn checked_sub(self, other: Self) -> Option<Self> {
                match self.0.checked_sub(other.0) {
                    Some(left) => Some(Self(left)),
                    None => None,
                }
            }
        }

        impl Add for $name {
            type Output = Self;
            fn add(self, other: Self) -> Self {
                Self(self.0.saturating_add(other.0))
            }
        }

        impl AddAssign for $name {
            fn add_assign(&mut self, other: Self) {
                *self = *self + other;
            }
        }

        impl Sum for $name {
            fn sum<I: Iterator<Item = Self>>(all: I) -> Self {
                all.fold(Self::ZERO, Add::add)
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, concat!("{}", $suffix), self.0)
            }
        }
    };
}

unit!(
    /// Tokens: units of model input or output.
    Tokens,
    " tokens"
);
unit!(
    /// KV blocks, each of the pool's block size.
    Blocks,
    " blocks"
);
unit!(
    /// Microseconds: a duration, or an instant on the caller's monotonic clock.
    Micros,
    " us"
);

impl Tokens {
    /// Whole blocks that hold this many tokens, rounded up.
    pub const fn blocks(self, block_size: BlockSize) -> Blocks {
        Blocks(self.0.div_ceil(block_size.get()))
    }
}

/// Tokens a block: at least one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct BlockSize(std::num::NonZeroU32);

impl BlockSize {
    /// `None` for zero.
    pub const fn new(tokens: u32) -> Option<Self> {
        match std::num::NonZeroU32::new(tokens) {
            Some(tokens) => Some(Self(tokens)),
            None => None,
        }
    }

    /// Tokens a block.
    pub const fn get(self) -> u64 {
        self.0.get() as u64
    }
}
unit!(
    /// Bytes of memory.
    Bytes,
    " B"
);
