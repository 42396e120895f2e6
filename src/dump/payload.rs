//! One payload file: found in its folder, checked for size, checksum and header, decoded to its tensor's dtype.

use super::error::{DumpError, DumpErrorKind};
use super::manifest::ShardEntry;
use super::names::ElementType;
use super::npy;
use super::shards::{Region, elements, multi_index};
use super::tensor::{Buffer, Data};
use half::bf16;
use memmap2::Mmap;
use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// A shard of a tensor: a file of one process's folder, and the region that it holds.
#[derive(Clone, Debug)]
pub struct ShardInfo {
    /// The process that wrote it.
    pub process: usize,
    /// The payload file.
    pub path: PathBuf,
    /// Where it lies in the tensor.
    pub region: Region,
    /// 0 for the tensor itself, above for copies.
    pub replica: usize,
    /// Size of the file in bytes, where the manifest gives it.
    pub bytes: Option<u64>,
    /// BLAKE3 of the file, where the manifest gives it.
    pub blake3: Option<blake3::Hash>,
}

/// How the elements of a payload are coded.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Coding {
    /// As the tensor's dtype.
    Own,
    /// A bfloat16 tensor as float32.
    Widened,
}

impl ShardInfo {
    pub(crate) fn new(folder: &Path, process: usize, entry: &ShardEntry) -> Self {
        let ShardEntry { file, region, replica, bytes, blake3 } = entry;
        Self { process, path: folder.join(file), region: region.clone(), replica: *replica, bytes: *bytes, blake3: *blake3 }
    }

    /// The elements of the region, row-major, in the machine's byte order: mapped where the file holds them just so.
    ///
    /// # Errors
    /// A file that is missing, not plain, of another size, with another checksum, another header, or with values that are not
    /// of `dtype`.
    pub(crate) fn load(&self, name: &str, dtype: ElementType) -> Result<Data, DumpError> {
        let map = self.map(name)?;
        let header = npy::parse(&map).map_err(|found| {
            self.error(
                DumpErrorKind::Header,
                name,
                found,
                "a .npy header, version 1.0 to 3.0",
                "write the file as numpy.save does",
            )
        })?;
        let coding = self.coding(name, dtype, &header.descr)?;
        if header.shape != self.region.shape {
            return Err(self.error(
                DumpErrorKind::Shape,
                name,
                format!("shape {:?}", header.shape),
                format!("shape {:?}, as the manifest says", self.region.shape),
                "correct the manifest, or write the file again",
            ));
        }
        let width = if coding == Coding::Widened { ElementType::F32.bytes() } else { dtype.bytes() };
        let end = elements(&header.shape).and_then(|n| n.checked_mul(width)).and_then(|n| n.checked_add(header.data));
        let Some(end) = end.filter(|&end| end == map.len()) else {
            let expected = end.map_or("more than memory can address".to_owned(), |end| end.to_string());
            return Err(self.error(
                DumpErrorKind::Length,
                name,
                format!("{} bytes", map.len()),
                format!("{expected} bytes: a header of {} and {:?} elements of {width}", header.data, header.shape),
                "the file was cut off or appended to; write the folder again",
            ));
        };
        let in_order = !header.fortran_order || header.shape.iter().filter(|&&extent| extent > 1).count() < 2;
        let aligned = header.data.is_multiple_of(dtype.bytes());
        if in_order && aligned && coding == Coding::Own && cfg!(target_endian = "little") {
            return Ok(Data::Mapped(Arc::new(map), header.data..end));
        }
        let mut source = Buffer::zeroed(end - header.data).ok_or_else(|| self.too_large(name))?;
        copy_elements(&map[header.data..end], source.bytes_mut(), &header.shape, width, !in_order);
        if cfg!(target_endian = "big") {
            source.bytes_mut().chunks_exact_mut(width).for_each(<[u8]>::reverse);
        }
        match coding {
            Coding::Own => Ok(Data::Owned(source)),
            Coding::Widened => self.narrowed(name, source.bytes()).map(Data::Owned),
        }
    }

    /// Maps the file, once it is known to be a plain one of the right size and checksum.
    fn map(&self, name: &str) -> Result<Mmap, DumpError> {
        require_plain_file(&self.path, name)?;
        let file = File::open(&self.path).map_err(|e| DumpError::read(&self.path, e))?;
        // SAFETY: a committed file is never written again (the format forbids it, and the writer only ever renames whole files
        // into place), so the mapping is not changed or cut off while it lives.
        let map = unsafe { Mmap::map(&file) }.map_err(|e| DumpError::read(&self.path, e))?;
        if let Some(bytes) = self.bytes.filter(|&bytes| bytes != map.len() as u64) {
            return Err(self.error(
                DumpErrorKind::Length,
                name,
                format!("{} bytes", map.len()),
                format!("{bytes} bytes, as the manifest says"),
                "the file was cut off or appended to; write the folder again",
            ));
        }
        if let Some(expected) = self.blake3 {
            let found = blake3::Hasher::new().update_rayon(&map).finalize();
            if found != expected {
                return Err(self.error(
                    DumpErrorKind::Checksum,
                    name,
                    format!("BLAKE3 {found}"),
                    format!("{expected}, as the manifest says"),
                    "the file was damaged or replaced; copy it again from where it was captured",
                ));
            }
        }
        Ok(map)
    }

    fn coding(&self, name: &str, dtype: ElementType, descr: &str) -> Result<Coding, DumpError> {
        match (dtype, descr) {
            (ElementType::Bf16, "<V2" | "|V2" | "<u2" | "bfloat16") => Ok(Coding::Own),
            (ElementType::Bf16, "<f4") => Ok(Coding::Widened),
            (ElementType::Bf16, _) => {
                let remedy = if descr == "<f2" {
                    "float16 is another number than bfloat16: save the bfloat16 bits, as .view(np.uint16)"
                } else {
                    "save the bfloat16 bits, as .view(np.uint16)"
                };
                let expected = "<V2, |V2, <u2, bfloat16, or <f4 with bfloat16 values, since the manifest says bfloat16";
                Err(self.error(DumpErrorKind::Encoding, name, format!("descr {descr:?}"), expected, remedy))
            }
            _ if descr == dtype.descr() => Ok(Coding::Own),
            _ => Err(self.error(
                DumpErrorKind::Encoding,
                name,
                format!("descr {descr:?}"),
                format!("{}, since the manifest says {}", dtype.descr(), dtype.name()),
                "correct the manifest's dtype, or save the array in it",
            )),
        }
    }

    /// The float32 elements `bytes` as bfloat16, provided that each is one.
    fn narrowed(&self, name: &str, bytes: &[u8]) -> Result<Buffer, DumpError> {
        let mut narrow = Buffer::zeroed(bytes.len() / 2).ok_or_else(|| self.too_large(name))?;
        let pairs = bytes.as_chunks::<4>().0.iter().zip(narrow.bytes_mut().as_chunks_mut::<2>().0);
        for (i, (wide, out)) in pairs.enumerate() {
            let bits = u32::from_ne_bytes(*wide);
            if bits & 0xFFFF != 0 {
                let mut index = multi_index(&self.region.shape, i);
                index.iter_mut().zip(&self.region.start).for_each(|(at, start)| *at += start);
                let value = f32::from_bits(bits);
                return Err(self.error(
                    DumpErrorKind::Inexact,
                    name,
                    format!("float32 value {value:e} at {index:?} is no bfloat16"),
                    format!("values that are exactly bfloat16; the nearest here is {:e}", bf16::from_f32(value).to_f32()),
                    "declare the tensor float32 if the computation used float32, else save the bfloat16 bits",
                ));
            }
            *out = ((bits >> 16) as u16).to_ne_bytes();
        }
        Ok(narrow)
    }

    pub(crate) fn too_large(&self, name: &str) -> DumpError {
        let found = format!("{} does not fit in memory", self.region);
        self.error(DumpErrorKind::TooLarge, name, found, "a tensor that fits", "use a machine with more memory")
    }

    pub(crate) fn error(
        &self,
        kind: DumpErrorKind,
        name: &str,
        found: impl Into<String>,
        expected: impl Into<String>,
        remedy: impl Into<String>,
    ) -> DumpError {
        DumpError::new(kind, format_args!("{}: {name}", self.path.display()), found, expected, remedy)
    }
}

/// Whether `path` is a file of its own folder, and no link, pipe or folder.
pub(crate) fn require_plain_file(path: &Path, what: &str) -> Result<(), DumpError> {
    let place = format_args!("{}: {what}", path.display());
    match fs::symlink_metadata(path) {
        Ok(metadata) if metadata.is_file() => Ok(()),
        Ok(metadata) => {
            let found = if metadata.is_symlink() { "it is a symbolic link" } else { "it is no file" };
            let remedy = "put the file itself into the folder";
            Err(DumpError::new(DumpErrorKind::FileName, place, found, "a plain file", remedy))
        }
        Err(e) if e.kind() == io::ErrorKind::NotFound => {
            let remedy = "copy it from where it was captured, or remove the manifest to give the folder up";
            Err(DumpError::new(DumpErrorKind::MissingFile, place, "the file is missing", "the file", remedy).caused_by(e))
        }
        Err(e) => Err(DumpError::read(path, e)),
    }
}

/// Copies elements of `width` bytes from an array of `shape` in C order (or in Fortran order) to one in C order.
fn copy_elements(from: &[u8], to: &mut [u8], shape: &[usize], width: usize, fortran: bool) {
    if !fortran {
        return to.copy_from_slice(from);
    }
    let Some((&columns, outer)) = shape.split_last().filter(|_| !to.is_empty()) else { return };
    let stride = |d: usize| -> usize { shape[..d].iter().product() };
    let across = stride(outer.len());
    for (row, to) in to.chunks_exact_mut(columns * width).enumerate() {
        let first: usize = multi_index(outer, row).iter().enumerate().map(|(d, i)| i * stride(d)).sum();
        for (column, element) in to.chunks_exact_mut(width).enumerate() {
            element.copy_from_slice(&from[(first + column * across) * width..][..width]);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fortran_order_is_the_transpose_of_the_reversed_shape() {
        for shape in [&[2, 3, 4][..], &[3, 2], &[5], &[], &[2, 0, 3], &[2, 3, 0]] {
            let reversed: Vec<usize> = shape.iter().rev().copied().collect();
            let count: usize = shape.iter().product();
            let from: Vec<u8> = (0..count).flat_map(|i| (i as u16).to_le_bytes()).collect();
            let mut to = vec![0; from.len()];
            copy_elements(&from, &mut to, shape, 2, true);
            for (flat, element) in to.as_chunks::<2>().0.iter().enumerate() {
                let mut index = multi_index(shape, flat);
                index.reverse();
                let expected = index.iter().zip(&reversed).fold(0, |at, (i, extent)| at * extent + i);
                assert_eq!(u16::from_le_bytes(*element) as usize, expected, "{shape:?} {flat}");
            }
        }
    }
}
