//! What an administrator asks for, of one node or of the whole cluster.

use std::fmt;
use std::str::FromStr;

use crate::state::Unknown;

/// A request. On a Node it is about that node, on the Job about every node that has none of its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Request {
    /// Nothing is started; what has begun goes on to its end.
    Pause,
    /// To rest by the shortest way: what has changed nothing yet is called off, the rest goes on to its end. Nothing is started.
    Abort,
    /// Back to flannel, and stay there.
    Rollback,
}

impl Request {
    /// The annotation's value.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Pause => "pause",
            Self::Abort => "abort",
            Self::Rollback => "rollback",
        }
    }
}

impl fmt::Display for Request {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl FromStr for Request {
    type Err = Unknown;

    fn from_str(text: &str) -> Result<Self, Unknown> {
        match text {
            "pause" => Ok(Self::Pause),
            "abort" => Ok(Self::Abort),
            "rollback" => Ok(Self::Rollback),
            _ => Err(Unknown { text: text.to_owned(), known: "pause, abort, rollback" }),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn requests_read_back_what_they_write() {
        for request in [Request::Pause, Request::Abort, Request::Rollback] {
            assert_eq!(request.as_str().parse(), Ok(request));
        }
        assert!("Pause".parse::<Request>().is_err());
    }
}
