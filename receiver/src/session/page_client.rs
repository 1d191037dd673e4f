//! CRIU's page-server protocol, giving: pages of finished images to `criu lazy-pages`, which fetches
//! what a restored process touches, and in the background everything else.

use crate::file_error::FileError;
use crate::image::chain::{images, levels, newest_round};
use crate::image::index::{Index, Pages};
use pageferry_common::criu::page_server::{
    Command, HEADER_MAX, Header, PageLocation, UnknownCommand, Width,
};
use pageferry_common::{CHUNK_PAGES, CHUNK_SIZE, ImageId, PAGE_SIZE};
use std::collections::BTreeMap;
use std::io::{self, BufReader, Read, Write};
use std::path::Path;

/// The private memory of every process in a directory of images.
#[derive(Debug)]
pub struct Served {
    tasks: BTreeMap<u32, Pages>,
}

/// Why a client is no longer served.
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    /// The connection.
    #[error("the connection failed")]
    Io(#[from] io::Error),
    /// The images.
    #[error(transparent)]
    File(#[from] FileError),
    /// The client's words.
    #[error("the peer broke the protocol")]
    Unknown(#[from] UnknownCommand),
    /// It wants what no client of this protocol wants here.
    #[error("it wants to send pages, not to fetch them: that is what `receive --listen` is for")]
    Sends,
    /// It wants pages of a process that is not in the images.
    #[error("it wants pages of process {0}, which is not here")]
    NoProcess(u64),
    /// It wants pages that the images have not.
    #[error("it wants the pages of process {pid} at {address:#x}, which are not here")]
    NoPages {
        /// The process.
        pid: u32,
        /// The first of them.
        address: u64,
    },
}

impl Served {
    /// Finds the pages of every process in `dir` (or its newest round), wherever in the chain they
    /// are.
    ///
    /// # Errors
    /// [`FileError`].
    pub fn load(dir: &Path) -> Result<Self, FileError> {
        let top = newest_round(dir)?;
        let chain = levels(&top)?;
        let mut tasks = BTreeMap::new();
        for image in images(&top)? {
            // Shared segments are restored before any process runs; nobody asks for them later.
            if let ImageId::Process(pid) = image
                && let Some(index) = Index::load(&chain, image)?
            {
                tasks.insert(pid, Pages::open(&chain, image, index)?);
            }
        }
        Ok(Self { tasks })
    }

    /// How many processes there are.
    #[must_use]
    pub fn processes(&self) -> usize {
        self.tasks.len()
    }

    /// Serves a client, for as long as it takes, until it says that it has everything, or goes. Returns the pages given, and
    /// whether it has everything.
    ///
    /// # Errors
    /// [`ServeError`].
    pub fn serve(&self, read: impl Read, mut write: impl Write) -> Result<(u64, bool), ServeError> {
        let mut reader = BufReader::new(read);
        let mut buffer = vec![0; HEADER_MAX + CHUNK_SIZE];
        let mut width = None;
        let mut given = 0;
        while let Some(header) = self.next(&mut reader, &mut width)? {
            match header.command {
                Command::Get => {
                    let width = width.unwrap_or(Width::Narrow);
                    let answer = self.answer(header, width, &mut buffer)?;
                    write.write_all(answer)?;
                    given += answer.len() as u64 / PAGE_SIZE;
                }
                Command::Close => {
                    write.write_all(&0i32.to_le_bytes())?;
                    return Ok((given, true));
                }
                Command::Open { .. } | Command::HasParent | Command::Add(_) => {
                    return Err(ServeError::Sends);
                }
            }
        }
        Ok((given, false))
    }

    /// The next request; `None` if the client is gone.
    fn next(
        &self,
        reader: &mut impl Read,
        width: &mut Option<Width>,
    ) -> Result<Option<Header>, ServeError> {
        let mut bytes = [0; Width::Wide.header_len()];
        let (first, more) = bytes.split_at_mut(Width::Narrow.header_len());
        match reader.read(&mut first[..1])? {
            0 => return Ok(None),
            _ => reader.read_exact(&mut first[1..])?,
        }
        let narrow = Header::decode(first, Width::Narrow)?;
        let known = *width.get_or_insert_with(|| {
            // The last of a narrow request is the process; a longer one has the address there, and
            // no address is as low as a process's number.
            let is_process = u32::try_from(narrow.object).is_ok_and(|pid| self.has(pid));
            match is_process || narrow.command == Command::Close {
                true => Width::Narrow,
                false => Width::Wide,
            }
        });
        if known == Width::Narrow {
            return Ok(Some(narrow));
        }
        reader.read_exact(more)?;
        Ok(Some(Header::decode(&bytes, known)?))
    }

    fn has(&self, pid: u32) -> bool {
        self.tasks.contains_key(&pid)
    }

    /// Puts the pages asked for, or the first of them, into `buffer`; returns the whole answer.
    fn answer<'a>(
        &self,
        wanted: Header,
        width: Width,
        buffer: &'a mut [u8],
    ) -> Result<&'a [u8], ServeError> {
        let pid = u32::try_from(wanted.object).ok();
        let task = pid.and_then(|pid| Some((pid, self.tasks.get(&pid)?)));
        let (pid, pages) = task.ok_or(ServeError::NoProcess(wanted.object))?;
        let most = (wanted.pages.min(CHUNK_PAGES as u64) * PAGE_SIZE) as usize;
        let address = wanted.address;
        let pages = match address.is_multiple_of(PAGE_SIZE) {
            true => pages.read(address, &mut buffer[HEADER_MAX..][..most])?,
            false => 0,
        };
        if pages == 0 {
            return Err(ServeError::NoPages { pid, address });
        }
        let mut head = Vec::with_capacity(HEADER_MAX);
        let header = Header {
            command: Command::Add(PageLocation::Present { lazy: false }),
            pages,
            ..wanted
        };
        header.encode(width, &mut head);
        let start = HEADER_MAX - head.len();
        buffer[start..HEADER_MAX].copy_from_slice(&head);
        Ok(&buffer[start..HEADER_MAX + (pages * PAGE_SIZE) as usize])
    }
}
