"""Two checkpoints that torch 2.13.0 wrote, and what is in them."""

import base64
import zlib

import numpy as np

# torch.save of `contents()` as tensors, with `weight` a Linear's state_dict.
_ZIPPED = (
  "c-o~_U2oe|7(TXBCr!J4t<bJO8Q&>%Y5bA2-P)!#!vj1-8-x^9LXn%eiG>sAjZfPRsZyoUNR"
  "zl=LgI4bKOn?y{{mcafw-8oiwOzA4}c5Ku@l#JnibZQym4Z`&+|U#_`FZNsc|uc5((5Z#?S="
  "PTjiR$Z!A=Ftf!lwTdFdGwnO8HJp`004iG@yt{4_D<+5#AMj4xS!%2SJsu(S!a?>p1B(QS@;"
  "EFs+Juu8_4MVJqZBij!+QX*hBug!0XV0`MC2TYtyH(m3lQ57<72^cqkW9U50PjJPs%7i=6Yp"
  "da;zfq!WFS%G$g$kqgF%hQklfOc#%XLDhBQ`V+Aw^-Mnzo0Fj9a~=Mct<g9K2j8(61vgmL%!"
  "M3F84Tt0+JxA?x%a>#VxIgN1~XUCoGzG)md@cd^mm8ubuHNNJF5Ma7Cs10MdLW{>Vt_?F9qs"
  "7|rf>-=S3@;U6whO9t(qG;p$t=}+m40c%D_;7m7+x#D>(TT#wzQ$SIWOf+3~v=6WfaMsL^a*"
  "og*h+1vsQ|`SVGQUuD4yKBD_PmSPb)2DSHgpH0Bu69_IpvOaTO!a@W$UAciSz+w$oomreqi&"
  "~X^D?y4U{j?yi9bW0eP3vk_CIR_g}2X2J;ZrhEj&$r_8$*@ZJ7z}HKuRGN|hV=q$xI9L^iSL"
  "3ETKz1%OF#(2O)3J>)qjud0CMY9kKh)D_Y3fWN6@s(HTY2D+*!7CY=Cwv|H#|^?zx6d&fRvI"
  "@4!cU=}j%3_-Fj9AO2(!qOsYxd#2DOzkAZVcB`)AQfC{f%HU}e36%23zka(%YtZOVIfE8YDL"
  "eg8(k-*vs2dHeDpI61|I^6HR6za!ekapG>{A7dqr5L*=PovE+T5yg<5}u<hh<`H8C1jZ>f<Z"
  "a8~CSc7(r_xS6axZ%JmBf@K}%X<YS$@NgR>*Zk;Nc`ufR(X>wuu97XeCMS`lN&_(MbbVA}03"
  "A91Hn8Z~QnGLGz&f)G_hWgz(x+cTAL{%B<(RGqXCzLb3wf&gx_}Dp|>tRkwRaP!?`?ndy(DL"
  "8k`|>`uZtk4&8{zV@s;pk9{C2!UO+_?+d1BM5310*{Q^ZPGL{?Rno>@fy$&RASejVRAMx%wK"
  "Bvt;?!|JE!_wOtcPYuMC?iekTILH?|{kJZe6;(<9&zT5fZYi5vl$LYLIhnk~oFHVDC0P>0B~"
  "g%NF_+28f+SLv4}bmRAVqYfT$KzJ>+1}<>R6BR=yOOE9W>CX5OR$}{d_n|5;Vb?5XpleNsse"
  "Jd4fhZ9^#pZp<V-x!h^0e5`uplLlN(bVuQ{Q#-;`$SRslHIzSkE62*#9Y_NU9*hxNum7>^S*"
  "M+g)M6q%gdv;$2$8<b`%|`16duB9*Jqlp^?3LhFo(+M24uH>YvQ3TW=esS*UGtH{k>lTN=cX"
  "pQ7R9@6<qUbhy{Cl%-op&L`Cjh7Xf%@5"
)
# The same with _use_new_zipfile_serialization=False.
_PICKLED = (
  "c-n=NTT|0O6vsE0wh}JlUA*GGc&TZD(s(N%g1THJzT}0;gmh`*gr+Cif;iKezR*!WgAYFXG5"
  "9FF`VpM*!IPvgR6CgI*=*0A{hj}wJ!y$w74P@A`Cp?Se!LsWwZx^L5{^wES!0+GQV)FY+rDR"
  "Ru^@E)8VDF*4C0FCa_%vc)he!41M#z=pp);^nHjpDSO`)R<gAfGXXy9=hZGeJ3IDk@4rwYIa"
  ">Vd!Rmf1e(KyH%#c%o*=7C^iT94Trvxdq_P+<Y9%(*sKKpfLSGSV2j&D^TPLAJRc*iO!DaMu"
  "eJGhpit*Q=PE)j~fow+afRvRNY&iNQ##${?L=QRY40;_nlu0vTfnW3&make@6}PED!mcmYnt"
  "y6t)c`e=HYgR)8qm8jT;ekxL-4Fg}CNYWsOAstSJO&B)%aEH0cxK**Z1*hWm(*`;ToN2<@Sj"
  "s_3&ru-^!}a*=TQ1uU;rtq0$T}$5Njpa*74vzmSWvYhTy*;A07@B&q{vii!zC(Exeb>SDOWg"
  "L)#2K4i0d81=qdul=rlK?NgHk^h+7<P>u~2d#N7_!-YV@M8%wrjIpBDo#rNx2-Ud8K5S@C@#"
  "s$w84@>^AtK^zmEU79yLb8bDTy#Eh7amh#7t|y}o<l*0@i@VTXH{XMJAv<ehw#ZRcuCVHN+l"
  ">FTtfI%e2=?Oir`uTf5PFZ4$qRl<*XjU^Dg=#cI+Yj#b46Ze4zwoqzg!&M*2ZfW;o31@G_>d"
  "%{t$Kxqs`LAWB%*SBM~pn2!XK=yn&d->}hMC%88p-s(UTT-~=FSfo;1kHF##mKMtUBz|IF%}"
  "3v|A>i~QtVCbhTJ)v$Xmp`hwZvYBlzPdQd);KJSL38vE=`U;tuhYN_(N-<eV>*(D*_RO&NM^"
  "1AF=b^E0eu}|KKnRZ6A%y5HgH5il)x|0owC2AO"
)


def zipped() -> bytes:
  return zlib.decompress(base64.b85decode(_ZIPPED))


def pickled() -> bytes:
  return zlib.decompress(base64.b85decode(_PICKLED))


def contents() -> dict[str, np.ndarray]:
  base = np.arange(12, dtype=np.float32).reshape(3, 4)
  return {
    "model/weight": np.arange(6, dtype=np.float32).reshape(3, 2),
    "views/0": base.T,
    "views/1": base[1:, ::2],
    "views/2": base[2, 3],
    "half": np.asarray([1.5, -2.0], np.float32),  # bfloat16 in the file
    "flag": np.asarray([True, False, True]),
    "steps": np.asarray(7),
    "empty": np.zeros((0, 3), np.float32),
  }


METADATA = {"epoch": 3, "rate": 0.5, "note": "x"}
